"""The same as `dldr_ext.distributed.checkpoint`."""

from .distributed.checkpoint import stateful as stateful
