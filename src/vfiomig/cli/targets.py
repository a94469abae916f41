"""Which device a verb is about: TARGET, or a descriptor that the program was started with."""

from __future__ import annotations

from vfiomig.errors import SpecError

__all__ = ("named",)


def named(verb: str, target: str, fd: int | None) -> str:
    """Return the TARGET that was meant.

    Raises:
        SpecError: none was named, or two.
    """
    if fd is None:
        if not target:
            raise SpecError(
                f"name a device: vfiomig {verb} /dev/vfio/devices/vfio0, or model:counter"
            )
        return target
    if target:
        raise SpecError(f"{target} and --fd {fd} are two devices: leave one out")
    if fd < 0:
        raise SpecError(f"--fd {fd}: give the number of an open descriptor")
    return f"fd:{fd}"
