"""What secure aggregation costs on an update of vit_b under the flap-sam preset.

    python -m benchmarks.secure_sum

Times are those of one core, without what other processes take. The protocol runs whole: keys,
signatures, shares, masks and their removal; only the network is left out.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Collection
from typing import TypeVar

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from numpy.typing import NDArray

from benchmarks.codecs import vit_b_shapes
from samaritan.keys import Identity
from samaritan.privacy.secure_sum import Coordinator, Member, Record, Terms
from samaritan.privacy.secure_sum.fixed_point import step_size

_REPEATS = 3
_CLIP = 1.0
_CASES = [(3, 0), (10, 0), (10, 1), (10, 3), (30, 0), (30, 1)]
_T = TypeVar("_T")


def main() -> None:
    """Prints a row for each number of sites and of sites that drop out before they send."""
    length = sum(int(np.prod(shape)) for shape in vit_b_shapes().values())
    print(f"{platform.machine()}, 1 thread, numpy {np.__version__}; {length} numbers")
    head = ("sites", "dropped", "site s", "server s", "total s", "site bytes", "of fp32")
    print("{:>6} {:>8} {:>8} {:>9} {:>8} {:>11} {:>8}".format(*head))
    for sites, dropped in _CASES:
        runs = [_Run(sites, dropped, length) for _ in range(_REPEATS)]
        site, server, total = (
            statistics.median(of_run)
            for of_run in zip(
                *(
                    (max(r.site_s.values()), r.server_s, r.server_s + sum(r.site_s.values()))
                    for r in runs
                ),
                strict=True,
            )
        )
        sent = max(runs[0].site_bytes.values())
        print(
            f"{sites:6} {dropped:8} {site:8.3f} {server:9.3f} {total:8.3f} {sent:11} "
            f"{sent / (4 * length):8.4f}"
        )


class _Run:
    """One whole protocol with its seconds of processor and bytes sent."""

    def __init__(self, sites: int, dropped: int, length: int) -> None:
        terms = Terms("benchmark", 1, 1, length, _CLIP)
        names = [f"site-{number:02}" for number in range(sites)]
        identities = {name: Identity(Ed25519PrivateKey.generate()) for name in names}
        pinned = {name: identity.public for name, identity in identities.items()}
        members = {n: Member(n, identities[n], pinned, terms, Record()) for n in names}
        values = {name: _update(seed, length) for seed, name in enumerate(names)}
        server = Coordinator(terms, pinned)
        self.site_s = dict.fromkeys(names, 0.0)
        self.site_bytes = dict.fromkeys(names, 0)
        self.server_s = 0.0

        roster = self._serve(server.call_roster, self._ask(names, lambda n: members[n].keys()))
        shares = self._ask(names, lambda n: members[n].shares(roster))
        sent = self._serve(server.deliver, shares)
        present = names[dropped:]
        masked = self._ask(present, lambda n: members[n].masked(sent[n], values[n]))
        survivors = self._serve(server.ask_agreement, masked)
        agreements = self._ask(present, lambda n: members[n].agreement(survivors))
        request = self._serve(server.ask_opening, agreements)
        openings = self._ask(present, lambda n: members[n].opening(request))
        total = self._serve(server.total, openings)

        plain = np.sum([values[name].astype(np.float64) for name in present], axis=0)
        assert np.abs(total - plain).max() <= sites * step_size(_CLIP, sites) / 2

    def _ask(
        self, names: Collection[str], answer: Callable[[str], bytes]
    ) -> list[tuple[str, bytes]]:
        answers = []
        for name in names:
            begun = time.process_time()
            data = answer(name)
            self.site_s[name] += time.process_time() - begun
            self.site_bytes[name] += len(data)
            answers.append((name, data))
        return answers

    def _serve(
        self, method: Callable[[list[tuple[str, bytes]]], _T], answers: list[tuple[str, bytes]]
    ) -> _T:
        begun = time.process_time()
        result = method(answers)
        self.server_s += time.process_time() - begun
        return result


def _update(seed: int, length: int) -> NDArray[np.float32]:
    """Numbers about 1e-3 large."""
    return np.random.default_rng(seed).standard_normal(length, dtype=np.float32) * np.float32(1e-3)


if __name__ == "__main__":
    main()
