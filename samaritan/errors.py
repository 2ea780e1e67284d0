"""Every failure a user can meet, with a code, what happened, and what to do.

The hierarchy; the letter in the code names the branch::

    SamaritanError
    ├── ConfigError      SAM-Cxxx   configuration files and --set
    ├── DataError        SAM-Dxxx   volumes, labels, manifests, splits
    ├── ModelError       SAM-Mxxx   base models, checkpoints, adapters
    ├── TrainingError    SAM-Txxx   local training and evaluation
    ├── FederationError  SAM-Fxxx   rounds, replies, quorum
    ├── PrivacyError     SAM-Pxxx   budgets, ledgers, secure aggregation
    ├── AuditError       SAM-Axxx   what leaves a site: its policy, the gate, the log
    ├── TrustError       SAM-Kxxx   certificates, keys, plans and who approved them
    ├── DeploymentError  SAM-Nxxx   start-up kits, processes, sockets, connections
    └── StorageError     SAM-Sxxx   run folders, checkpoints, disk
"""

from __future__ import annotations


class SamaritanError(Exception):
    """A failure with a stable code, a message for the person at the site and a way out.

    Args:
        code: Stable identifier such as ``SAM-D102``; the only part that may leave a site.
        message: What happened and where, with the value at fault.
        hint: What to do about it.
    """

    def __init__(self, code: str, message: str, hint: str = "") -> None:
        super().__init__(code, message, hint)
        self.code = code
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        text = f"{self.code}  {self.message}"
        return f"{text}\n  hint: {self.hint}" if self.hint else text

    def redacted(self) -> str:
        """The form that may leave a site: the code alone, no path, name or value."""
        return self.code


class ConfigError(SamaritanError):
    """A configuration file or a ``--set`` override is wrong."""


class DataError(SamaritanError):
    """A volume, label, manifest or split cannot be used."""


class ModelError(SamaritanError):
    """A base model, checkpoint or adapter cannot be used."""


class TrainingError(SamaritanError):
    """Local training or evaluation failed."""


class FederationError(SamaritanError):
    """A round could not be completed."""


class PrivacyError(SamaritanError):
    """A guarantee cannot be given: a budget, a ledger, a key or a protocol is not as it must be."""


class AuditError(SamaritanError):
    """Something must not leave a site, or the log of what left is not as it was written."""


class TrustError(SamaritanError):
    """A certificate, key or signature is not one to trust, or nobody approved a plan."""


class DeploymentError(SamaritanError):
    """A start-up kit, a process or a connection between two of them is not as it must be."""


class StorageError(SamaritanError):
    """A run folder or checkpoint could not be read or written."""
