"""Secure aggregation: the server learns the sum of the sites' updates and no single one.

The protocol of Bonawitz et al. (CCS 2017, eprint 2017/281) with its round against a server that
lies, on the full graph of 3 to 30 sites. A `Member` stands at each site, a `Coordinator` at the
server; what they exchange is bytes:

    site       keys        two public keys of this attempt, signed
    server     roster      everyone's keys and the threshold
    site       shares      shares of two seeds, sealed for each member
    server     delivery    what the others sealed for this member
    site       masked      the update in fixed point plus masks
    server     survivors   who sent one
    site       agreement   a signature of that list
    server     request     the list with at least a threshold of signatures
    site       opening     for each member one of its two shares

What it does not do: it bounds no update and finds no poisoned one, it cannot keep a member from
spoiling the sum, and a sum tells the more about one update the fewer honest members there are.
See `least_threshold` for how many members may help the server.
"""

from samaritan.privacy.secure_sum.agreed import agreed_terms
from samaritan.privacy.secure_sum.coordinator import Coordinator
from samaritan.privacy.secure_sum.member import Member
from samaritan.privacy.secure_sum.record import Record
from samaritan.privacy.secure_sum.terms import Terms, least_threshold

__all__ = ["Coordinator", "Member", "Record", "Terms", "agreed_terms", "least_threshold"]
