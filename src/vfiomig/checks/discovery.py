"""How a device is asked what it can do: VFIO_DEVICE_FEATURE, its header and its operations."""

from __future__ import annotations

import ctypes
import errno
from typing import TYPE_CHECKING

from vfiomig.abi import vfio
from vfiomig.abi.ioctls import FEATURES, Feature
from vfiomig.checks.check import LANDED, Chapter
from vfiomig.checks.evidence import Inapplicable, errno_text
from vfiomig.checks.facts import Shows
from vfiomig.checks.pages import Pages
from vfiomig.checks.raw import GET, PROBE, SET
from vfiomig.checks.resets import prefer_nothing_mended
from vfiomig.fsm import LEGAL_SETS, Capability, State

if TYPE_CHECKING:
    from vfiomig.checks.subject import Subject

__all__ = ("CHAPTER", "SERVED")

CHAPTER = Chapter(
    "discovery",
    "How a device is asked what it can do: the rules of VFIO_DEVICE_FEATURE.",
    {"section": "VFIO_DEVICE_FEATURE"},
)

MIGRATION = vfio.VFIO_DEVICE_FEATURE_MIGRATION
STATE = vfio.VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE
DATA_SIZE = vfio.VFIO_DEVICE_FEATURE_MIG_DATA_SIZE
PRECOPY_V2 = vfio.VFIO_DEVICE_FEATURE_MIG_PRECOPY_INFOv2
#: An index that no header has.
UNKNOWN = 0xFFFF
OPERATIONS = (0, GET, SET, GET | SET)
NAMES = {row.index: row.name for row in FEATURES}

#: The features of migration.
SERVED = tuple(row for row in FEATURES if row.index in {1, 2, 6, 7, 8, 9, 12})


def flags_text(flags: int) -> str:
    bits = {"PROBE": PROBE, "GET": GET, "SET": SET}
    asked = (
        " + ".join(name for name, bit in bits.items() if flags & bit)
        or "a request without an operation"
    )
    index = flags & 0xFFFF
    return f"{asked} of {NAMES.get(index, f'index {index:#x}')}"


def header_text(header: bytes) -> str:
    fields = vfio.DeviceFeature.parse(header)
    return f"argsz {fields.argsz}, flags {fields.flags:#x}"


def present(subject: Subject) -> list[Feature]:
    """The features of migration that this device has."""
    found = [row for row in SERVED if row.index in subject.facts.features]
    if not found:
        raise Inapplicable("the device answers no PROBE of a feature")
    return found


def ask(subject: Subject, flags: int, size: int = 0, argsz: int | None = None) -> int:
    """Make a feature request with a payload of zeros; return its errno."""
    step = subject.evidence.step(flags_text(flags))
    answer = subject.raw.feature(flags, bytes(size), argsz)
    subject.evidence.outcome(step, errno_text(answer.errno))
    return answer.errno


@CHAPTER.check(
    "STATE-2", "CLOSE-2", "GET-LANDED-5", "SET-V6-13",
    section="enum vfio_device_mig_state", shows=Shows.REOPENING, as_it_is=True,
)  # fmt: skip
def an_untouched_device_is_in_running(subject: Subject) -> None:
    """Before anything was asked of it a device is in RUNNING, and says so.

    V6 has no query, so ERROR is asked for there, which is refused and tells the state.
    """
    prefer_nothing_mended(subject, subject.mended)
    subject.evidence.step("ask for the state")
    reply = subject.raw.get_state()
    subject.evidence.expect_errno("the query of the state", reply.errno, 0)
    what = "the state before any request"
    subject.evidence.expect_state(what, reply.device_state, State.RUNNING)


@CHAPTER.check("DIALECT-3", "FEATURE-13", section="VFIO_DEVICE_FEATURE_MIGRATION")
def a_probe_finds_migration(subject: Subject) -> None:
    """A PROBE of MIGRATION succeeds, alone and together with GET."""
    for flags in (PROBE, PROBE | GET):
        result = ask(subject, flags | MIGRATION)
        subject.evidence.expect_errno(flags_text(flags | MIGRATION), result, 0)


@CHAPTER.check(
    "MIGRATION-1", "CAP-1", section="VFIO_DEVICE_FEATURE_MIGRATION", without_migration=True
)
def the_capability_set_means_something(subject: Subject) -> None:
    """MIGRATION answers one of the four capability sets, all of which hold STOP_COPY."""
    if MIGRATION not in subject.facts.features:
        raise Inapplicable("the device has no migration")
    answer = subject.raw.feature(GET | MIGRATION, bytes(8))
    subject.evidence.step(flags_text(GET | MIGRATION))
    subject.evidence.expect_errno("GET of MIGRATION", answer.errno, 0)
    flags = int.from_bytes(answer.payload, "little")
    legal = ", ".join(f"{int(caps)}" for caps in LEGAL_SETS)
    what = "the flags that MIGRATION answers"
    subject.evidence.expect_that(what, flags in LEGAL_SETS, f"one of {legal}", str(flags))


@CHAPTER.check("CAP-2", section="VFIO_DEVICE_FEATURE_MIGRATION")
def the_capability_set_never_changes(subject: Subject) -> None:
    """MIGRATION answers the same in every state, and after a reset."""
    for state in (State.STOP, State.STOP_COPY, State.STOP, State.RUNNING):
        subject.go(state)
        _expect_same_flags(subject, f"the flags of MIGRATION in {state.name}")
    subject.reset()
    _expect_same_flags(subject, "the flags of MIGRATION after a reset")


def _expect_same_flags(subject: Subject, when: str) -> None:
    subject.evidence.step("GET of MIGRATION")
    answer = subject.raw.feature(GET | MIGRATION, bytes(8))
    flags = int.from_bytes(answer.payload, "little")
    subject.evidence.expect(when, flags, subject.facts.flags, show=hex)


@CHAPTER.check("FEATURE-6", "DIALECT-3", without_migration=True)
def without_migration_there_is_none_of_it(subject: Subject) -> None:
    """A device that lacks MIGRATION lacks MIG_DEVICE_STATE and MIG_DATA_SIZE too."""
    if MIGRATION in subject.facts.features:
        raise Inapplicable("the device has MIGRATION")
    others = (errno.EINVAL,) if subject.is_v6 else ()
    for flags in (PROBE | GET | MIGRATION, PROBE | GET | SET | STATE, PROBE | GET | DATA_SIZE):
        known = {errno.EINVAL: "FEATURE-5"} if flags & 0xFFFF == DATA_SIZE else None
        result = ask(subject, flags)
        subject.evidence.expect_errno(flags_text(flags), result, errno.ENOTTY, *others, known=known)


@CHAPTER.check("QUERY-V6-3", section="VFIO_DEVICE_FEATURE_MIGRATION", shows=Shows.ALL_REQUESTS)
def every_combination_of_flags_has_its_answer(subject: Subject) -> None:
    """GET, SET and PROBE in every combination, with argsz from 8 to 24, on MIGRATION."""
    for flags in (base | probe for probe in (0, PROBE) for base in OPERATIONS):
        for argsz in (8, 12, 15, 16, 17, 24):
            fits = flags == GET and argsz >= 16
            wanted = 0 if fits or flags in {PROBE, PROBE | GET} else errno.EINVAL
            result = ask(subject, flags | MIGRATION, 16, argsz)
            what = f"{flags_text(flags | MIGRATION)}, argsz {argsz}"
            subject.evidence.expect_errno(what, result, wanted)


@CHAPTER.check("FEATURE-1", shows=Shows.FAULTS)
def a_header_that_cannot_be_read_is_efault(subject: Subject) -> None:
    """A header that cannot be read, wholly or in its second half, is EFAULT."""
    with Pages("rw", "") as pages:
        for what, address in (
            ("VFIO_DEVICE_FEATURE whose header is in no memory", pages.page(1)),
            ("VFIO_DEVICE_FEATURE with half a header", pages.end(0, 4)),
            ("VFIO_DEVICE_FEATURE with a null pointer", 0),
        ):
            subject.evidence.step(what)
            subject.evidence.expect_errno(what, subject.raw.feature_at(address), errno.EFAULT)


@CHAPTER.check("FEATURE-2", shows=Shows.ALL_REQUESTS)
def argsz_holds_the_header(subject: Subject) -> None:
    """An argsz below 8 is EINVAL, whatever is asked."""
    for argsz in (0, 4, 7):
        result = ask(subject, PROBE | MIGRATION, 8, argsz)
        what = f"{flags_text(PROBE | MIGRATION)}, argsz {argsz}"
        subject.evidence.expect_errno(what, result, errno.EINVAL)


@CHAPTER.check("FEATURE-3", shows=Shows.ALL_REQUESTS)
def unknown_flags_are_refused(subject: Subject) -> None:
    """A flag that the header does not know is EINVAL, to a PROBE as well."""
    for bit in (19, 20, 31):
        result = ask(subject, 1 << bit | PROBE | MIGRATION)
        what = f"{flags_text(PROBE | MIGRATION)} with flag bit {bit}"
        subject.evidence.expect_errno(what, result, errno.EINVAL)


@CHAPTER.check("FEATURE-4", shows=Shows.ALL_REQUESTS)
def get_and_set_together_are_refused(subject: Subject) -> None:
    """GET and SET together are EINVAL, unless they are only probed."""
    for row in present(subject):
        flags = GET | SET | row.index
        subject.evidence.expect_errno(flags_text(flags), ask(subject, flags, 32), errno.EINVAL)
        both = row.ops == GET | SET
        wanted = 0 if both else errno.EINVAL
        subject.evidence.expect_errno(
            flags_text(PROBE | flags), ask(subject, PROBE | flags), wanted
        )


@CHAPTER.check("FEATURE-5", "CHOICE-7", shows=Shows.ALL_REQUESTS)
def an_unknown_index_is_refused(subject: Subject) -> None:
    """A feature that no header has is ENOTTY; in V6, and in Linux 5.18, EINVAL."""
    for flags in (PROBE | UNKNOWN, GET | UNKNOWN, SET | 0x7FFE):
        result = ask(subject, flags, 16)
        if subject.is_v6:
            subject.evidence.expect_errno(flags_text(flags), result, errno.EINVAL, errno.ENOTTY)
        else:
            subject.evidence.expect_errno(
                flags_text(flags), result, errno.ENOTTY, known={errno.EINVAL: "FEATURE-5"}
            )


@CHAPTER.check("FEATURE-7", shows=Shows.ALL_REQUESTS)
def an_operation_that_a_feature_lacks_is_refused(subject: Subject) -> None:
    """GET of what can only be set, or SET of what can only be asked, is EINVAL, probed too."""
    for row in present(subject):
        for operation in (GET, SET):
            if operation & row.ops:
                continue
            for flags in (operation, PROBE | operation):
                result = ask(subject, flags | row.index, 32)
                subject.evidence.expect_errno(flags_text(flags | row.index), result, errno.EINVAL)


@CHAPTER.check("FEATURE-8", shows=Shows.FAULTS)
def a_probe_touches_no_payload(subject: Subject) -> None:
    """A PROBE succeeds with a header and nothing behind it, whatever argsz says."""
    with Pages("rw", "") as pages:
        for row in present(subject):
            for argsz in (8, row.minsz, 4096):
                address = pages.end(0, 8)
                header = vfio.DeviceFeature.from_address(address)
                header.argsz, header.flags = argsz, PROBE | row.ops | row.index
                what = f"{flags_text(header.flags)}, argsz {argsz}"
                subject.evidence.step(what)
                subject.evidence.expect_errno(
                    f"{what}, nothing behind the header", subject.raw.feature_at(address), 0
                )


@CHAPTER.check("FEATURE-8", dialects=LANDED)
def a_probe_changes_nothing(subject: Subject) -> None:
    """A PROBE of SET of the state leaves the device where it is, whatever stands behind the header."""
    flags = PROBE | SET | STATE
    subject.evidence.step(f"{flags_text(flags)}, to STOP")
    answer = subject.raw.feature(flags, bytes(vfio.MigState(device_state=State.STOP, data_fd=-1)))
    subject.evidence.expect_errno(flags_text(flags), answer.errno, 0)
    subject.expect_state(State.RUNNING)


@CHAPTER.check("FEATURE-9", shows=Shows.ALL_REQUESTS)
def a_request_without_an_operation_is_refused(subject: Subject) -> None:
    """Without GET, SET and PROBE a request is EINVAL."""
    for row in present(subject):
        result = ask(subject, row.index, 32)
        subject.evidence.expect_errno(flags_text(row.index), result, errno.EINVAL)


@CHAPTER.check("FEATURE-10", shows=Shows.ALL_REQUESTS)
def argsz_covers_the_payload(subject: Subject) -> None:
    """An argsz that ends one byte before the payload does is EINVAL."""
    for row in present(subject):
        if row.minsz == 8:
            continue
        for operation in (GET, SET):
            if not operation & row.ops:
                continue
            result = ask(subject, operation | row.index, 64, row.minsz - 1)
            what = f"{flags_text(operation | row.index)}, argsz {row.minsz - 1}"
            subject.evidence.expect_errno(what, result, errno.EINVAL)


@CHAPTER.check("FEATURE-11")
def a_larger_argsz_is_accepted(subject: Subject) -> None:
    """An argsz beyond the payload is accepted, and the bytes beyond stay as they are.

    So it is for a GET, and for a SET of the state.
    """
    for argsz in (17, 64, 0xFFFF_FFFF):
        subject.evidence.step(f"GET of MIGRATION, argsz {argsz}")
        answer = subject.raw.feature(GET | MIGRATION, bytes(8) + b"\xa5" * 48, argsz)
        subject.evidence.expect_errno(f"GET of MIGRATION, argsz {argsz}", answer.errno, 0)
        subject.evidence.expect(
            "the bytes beyond the payload", answer.payload[8:], b"\xa5" * 48, show=bytes.hex
        )
    if not subject.is_v6:
        stop = bytes(vfio.MigState(device_state=State.STOP, data_fd=-1))
        subject.evidence.step("SET STOP, argsz 24")
        answer = subject.raw.feature(SET | STATE, stop + bytes(8))
        subject.evidence.expect_errno("SET STOP, argsz 24", answer.errno, 0)


@CHAPTER.check("FEATURE-12")
def the_header_is_never_written(subject: Subject) -> None:
    """The argsz and flags of a header stay as they are, after success and after a refusal."""
    for flags, argsz in ((GET | MIGRATION, 16), (SET | MIGRATION, 16), (GET | MIGRATION, 4096)):
        subject.evidence.step(f"{flags_text(flags)}, argsz {argsz}")
        answer = subject.raw.feature(flags, bytes(8), argsz)
        wanted = bytes(vfio.DeviceFeature(argsz=argsz, flags=flags))
        what = f"the header after {flags_text(flags)}"
        subject.evidence.expect(what, answer.header, wanted, show=header_text)


@CHAPTER.check("MIGRATION-3", shows=Shows.FAULTS, section="VFIO_DEVICE_FEATURE_MIGRATION")
def an_answer_that_cannot_be_written_is_efault(subject: Subject) -> None:
    """GET of MIGRATION into memory that cannot be written is EFAULT."""
    header = bytes(vfio.DeviceFeature(argsz=16, flags=GET | MIGRATION))
    with Pages("rw", "") as pages:
        address = pages.read_only(header + bytes(8))
        _expect_efault(subject, "GET of MIGRATION into read-only memory", address)
        pages.protect(0, "rw")
        edge = pages.end(0, len(header))
        ctypes.memmove(edge, header, len(header))
        _expect_efault(subject, "GET of MIGRATION with the payload in no memory", edge)


def _expect_efault(subject: Subject, what: str, address: int) -> None:
    subject.evidence.step(what)
    subject.evidence.expect_errno(what, subject.raw.feature_at(address), errno.EFAULT)


@CHAPTER.check("PRECOPY-9", dialects=LANDED, section="VFIO_DEVICE_FEATURE_MIG_PRECOPY_INFOv2")
def precopy_info_v2_goes_with_pre_copy(subject: Subject) -> None:
    """MIG_PRECOPY_INFOv2 is EINVAL on a device without PRE_COPY; old kernels do not know it."""
    result = ask(subject, PROBE | SET | PRECOPY_V2)
    what = flags_text(PROBE | SET | PRECOPY_V2)
    if Capability.PRE_COPY in subject.facts.capabilities:
        subject.evidence.expect_errno(what, result, 0, errno.ENOTTY)
    else:
        subject.evidence.expect_errno(what, result, errno.EINVAL, errno.ENOTTY)


@CHAPTER.check(
    "FEATURE-2", "FEATURE-3", "FEATURE-4", "FEATURE-5", "FEATURE-7", shows=Shows.ALL_REQUESTS
)
def the_first_fault_decides(subject: Subject) -> None:
    """Of several faults in one request the first in the order of checks is the answer."""
    unknown = errno.EINVAL if subject.is_v6 else errno.ENOTTY
    others = (errno.ENOTTY,) if subject.is_v6 else (errno.EINVAL,)
    for what, flags, argsz, wanted in (
        ("argsz 4 and an unknown index", PROBE | UNKNOWN, 4, errno.EINVAL),
        ("an unknown flag and an unknown index", 1 << 30 | UNKNOWN, 8, errno.EINVAL),
        ("GET and SET and an unknown index", GET | SET | UNKNOWN, 16, errno.EINVAL),
        ("SET of MIGRATION and a small argsz", SET | MIGRATION, 8, errno.EINVAL),
    ):
        result = ask_as(subject, what, flags, argsz)
        subject.evidence.expect_errno(f"a request with {what}", result, wanted)
    both = "an unknown index and no operation"
    result = ask_as(subject, both, UNKNOWN, 8)
    subject.evidence.expect_errno(f"a request with {both}", result, unknown, *others)


def ask_as(subject: Subject, what: str, flags: int, argsz: int) -> int:
    """Make a request that is bad in more than one way."""
    subject.evidence.step(f"FEATURE with {what}")
    return subject.raw.feature(flags, bytes(8), argsz).errno


@CHAPTER.check(
    "DIALECT-2", dialects=LANDED, section="VFIO_MIG_GET_PRECOPY_INFO", shows=Shows.MEANING
)
def the_number_0x3b79_is_nothing_on_a_device(subject: Subject) -> None:
    """0x3B79 is a request on a data_fd, and ENOTTY on the device itself."""
    argument = vfio.MigSetState(argsz=16, device_state=State.STOP, data_fd=-1, flags=1)
    subject.evidence.step("0x3B79 on the device")
    result = subject.raw.on_device(vfio.VFIO_DEVICE_MIG_SET_STATE, argument)
    subject.evidence.expect_errno("0x3B79 on the device", result, errno.ENOTTY)
    subject.expect_state(State.RUNNING)


@CHAPTER.check(
    "SESSION-11", section="VFIO_DEVICE_FEATURE", without_migration=True, shows=Shows.MEANING
)
def an_unknown_request_is_enotty(subject: Subject) -> None:
    """A request that no device has is ENOTTY."""
    for number in (0x3BFF, 0x1234):
        subject.evidence.step(f"request {number:#x}")
        result = subject.raw.on_device(number, vfio.MigSetState())
        subject.evidence.expect_errno(f"request {number:#x}", result, errno.ENOTTY)


# What a GET of the state needs and does; V6 has none.

QUERY = "VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE"


@CHAPTER.check("GET-LANDED-4", "GET-LANDED-5", dialects=LANDED, section=QUERY)
def the_state_is_told_in_every_state(subject: Subject) -> None:
    """GET of MIG_DEVICE_STATE tells the state that was reached, with a data_fd of -1."""
    for state in subject.states:
        subject.begin()
        subject.enter(state)
        subject.evidence.step("GET of the state")
        reply = subject.raw.get_state()
        subject.evidence.expect_errno(f"GET in {state.name}", reply.errno, 0)
        subject.evidence.expect_state(f"the state in {state.name}", reply.device_state, state)
        subject.evidence.expect(f"data_fd of GET in {state.name}", reply.data_fd, -1)
        subject.close_all()


@CHAPTER.check("GET-LANDED-2", dialects=LANDED, shows=Shows.FAULTS, section=QUERY)
def a_query_needs_a_payload_that_can_be_read(subject: Subject) -> None:
    """GET of the state reads its payload first, and is EFAULT if that cannot be done."""
    with Pages("rw", "") as pages:
        address = pages.end(0, 8)
        header = vfio.DeviceFeature.from_address(address)
        header.argsz, header.flags = 16, GET | STATE
        _expect_efault(subject, "GET of the state with the payload in no memory", address)


@CHAPTER.check("GET-LANDED-4", dialects=LANDED, shows=Shows.FAULTS, section=QUERY)
def a_query_into_read_only_memory_is_efault(subject: Subject) -> None:
    """GET of the state into memory that cannot be written is EFAULT."""
    header = bytes(vfio.DeviceFeature(argsz=16, flags=GET | STATE))
    with Pages("rw") as pages:
        address = pages.read_only(header + bytes(8))
        _expect_efault(subject, "GET of the state into read-only memory", address)
