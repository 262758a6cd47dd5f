"""The shared tier: sealed Arrow files on a filesystem that several nodes use. See `sharedtier`."""

from kvd.storage.shared.sharedtier import SharedTier

__all__ = ["SharedTier"]
