"""VFIO_DEVICE_FEATURE of the landed dialect: the header, each index, and MIG_DEVICE_STATE."""

from __future__ import annotations

import errno

import pytest

from in_process import GET, LANDED, PROBE, SET, V6, Pages, Program, Scripted, refusal
from vfiomig.abi import vfio
from vfiomig.fsm import LEGAL_SETS, Capability, State

FEATURE = vfio.VFIO_DEVICE_FEATURE
MIGRATION = vfio.VFIO_DEVICE_FEATURE_MIGRATION
MIG_DEVICE_STATE = vfio.VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE
MIG_DATA_SIZE = vfio.VFIO_DEVICE_FEATURE_MIG_DATA_SIZE
PRECOPY_INFO_V2 = vfio.VFIO_DEVICE_FEATURE_MIG_PRECOPY_INFOv2
LOG_START = vfio.VFIO_DEVICE_FEATURE_DMA_LOGGING_START
LOG_STOP = vfio.VFIO_DEVICE_FEATURE_DMA_LOGGING_STOP
LOG_REPORT = vfio.VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT

#: index: its operations and its smallest argsz.
SERVED = {
    MIGRATION: (GET, 16),
    MIG_DEVICE_STATE: (GET | SET, 16),
    LOG_START: (SET, 32),
    LOG_STOP: (SET, 8),
    LOG_REPORT: (GET, 40),
    MIG_DATA_SIZE: (GET, 16),
    PRECOPY_INFO_V2: (SET, 8),
}
OPERATIONS = [GET, SET, GET | SET, 0]


def mig_state(state: int, fd: int = 77) -> bytes:
    return bytes(vfio.MigState(device_state=state, data_fd=fd))


# The header.


def test_a_header_that_cannot_be_read_is_a_fault() -> None:
    with Program() as program, Pages("rw", "") as pages:
        for address in (0, 1 << 63, pages.page(1), pages.page(1) - 7):
            assert program.at(FEATURE, address) == errno.EFAULT


@pytest.mark.parametrize("argsz", [0, 7])
def test_argsz_covers_the_header_even_of_a_probe(argsz: int) -> None:
    with Program() as program:
        assert program.feature(PROBE | MIGRATION, argsz=argsz).errno == errno.EINVAL
        # ... before the index is looked at.
        assert program.feature(PROBE | 0x7777, argsz=argsz).errno == errno.EINVAL


@pytest.mark.parametrize("bit", range(19, 32))
def test_a_flag_that_nobody_knows_is_refused_before_the_index(bit: int) -> None:
    with Program() as program:
        for index in (MIGRATION, 0x7777):
            assert program.feature(PROBE | index | 1 << bit).errno == errno.EINVAL


def test_get_and_set_together_are_refused_before_the_index() -> None:
    with Program() as program:
        assert program.feature(GET | SET | 0x7777, bytes(8)).errno == errno.EINVAL
        assert program.feature(PROBE | GET | SET | 0x7777).errno == errno.ENOTTY


@pytest.mark.parametrize("index", [0, 3, 4, 5, 10, 11, 13, 14, 0x7777, 0xFFFF])
def test_an_index_that_is_not_about_migration_is_enotty(index: int) -> None:
    with Program() as program:
        for flags in (PROBE, GET, SET, PROBE | GET, 0):
            assert program.feature(flags | index, bytes(64)).errno == errno.ENOTTY


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("index", SERVED)
def test_a_probe_looks_at_the_operations_and_never_at_the_payload(
    index: int, operation: int
) -> None:
    with Program() as program, Pages("rw", "") as pages:
        header = bytes(vfio.DeviceFeature(argsz=8, flags=PROBE | operation | index))
        program.caller.write(pages.page(1) - 8, header)
        wanted = errno.EINVAL if operation & ~SERVED[index][0] else 0
        assert program.at(FEATURE, pages.page(1) - 8) == wanted
        assert program.state() is State.RUNNING


@pytest.mark.parametrize("index", SERVED)
def test_without_an_operation_or_with_a_wrong_one_it_is_refused(index: int) -> None:
    operations, _ = SERVED[index]
    with Program() as program:
        for operation in OPERATIONS:
            if operation & ~operations or operation in {0, GET | SET}:
                answer = program.feature(operation | index, bytes(64))
                assert answer == (errno.EINVAL, bytes(64))


@pytest.mark.parametrize("index", SERVED)
def test_argsz_covers_the_payload(index: int) -> None:
    operations, minsz = SERVED[index]
    with Program() as program:
        for operation in (GET, SET):
            if operation & operations and minsz > 8:
                answer = program.feature(operation | index, bytes(64), argsz=minsz - 1)
                assert answer == (errno.EINVAL, bytes(64))


@pytest.mark.parametrize("index", [MIGRATION, MIG_DEVICE_STATE, MIG_DATA_SIZE])
def test_a_larger_argsz_leaves_the_rest_alone(index: int) -> None:
    with Program() as program:
        answer = program.feature(GET | index, b"\xaa" * 32, argsz=4096)
        assert answer.errno == 0
        assert answer.data[8:] == b"\xaa" * 24


@pytest.mark.parametrize(
    ("index", "lacking"),
    [
        (MIGRATION, errno.ENOTTY),
        (MIG_DEVICE_STATE, errno.ENOTTY),
        (MIG_DATA_SIZE, errno.ENOTTY),
        (PRECOPY_INFO_V2, errno.EINVAL),
    ],
)
def test_a_device_that_cannot_migrate_lacks_the_features_of_migration(
    index: int, lacking: int
) -> None:
    with Program(Scripted(Capability(0))) as program:
        for operation in (PROBE, PROBE | GET, PROBE | SET, GET, SET, 0):
            assert program.feature(operation | index, bytes(8)).errno == lacking
        assert program.feature(PROBE | LOG_START).errno == 0
        assert program.reset() == 0


def test_a_device_without_a_log_lacks_the_features_of_logging() -> None:
    device = Scripted()
    device.dma_logging = False
    with Program(device) as program:
        for index in (LOG_START, LOG_STOP, LOG_REPORT):
            for operation in (PROBE, PROBE | GET, SET, 0):
                assert program.feature(operation | index, bytes(64)).errno == errno.ENOTTY
        assert program.feature(PROBE | MIGRATION).errno == 0


# MIGRATION and MIG_DATA_SIZE.


@pytest.mark.parametrize("caps", LEGAL_SETS)
def test_migration_tells_the_capability_set(caps: Capability) -> None:
    with Program(Scripted(caps)) as program:
        assert program.feature(GET | MIGRATION, bytes(8)) == (0, int(caps).to_bytes(8, "little"))


@pytest.mark.parametrize("index", [MIGRATION, MIG_DATA_SIZE])
def test_a_payload_that_cannot_be_written_is_a_fault(index: int) -> None:
    with Program() as program, Pages("rw") as pages:
        header = bytes(vfio.DeviceFeature(argsz=16, flags=GET | index))
        assert program.at(FEATURE, pages.read_only(header)) == errno.EFAULT


def test_the_data_size_may_be_asked_in_every_state() -> None:
    device = Scripted(data=b"x" * 1234)
    with Program(device) as program:
        states = (State.STOP, State.STOP_COPY, State.RESUMING)
        early = (State.PRE_COPY, State.PRE_COPY_P2P, State.RUNNING_P2P)
        for state in (State.RUNNING, *early, *states):
            if state is not State.RUNNING:
                program.reset()
                program.go(state)
            assert _data_size(program) == (0, 1234)
        program.served.migration.fail()
        assert _data_size(program) == (0, 1234)


def _data_size(program: Program) -> tuple[int, int]:
    answer = program.feature(GET | MIG_DATA_SIZE, bytes(8))
    return answer.errno, int.from_bytes(answer.data, "little")


@pytest.mark.parametrize("number", [errno.ENOTCONN, errno.EFAULT, errno.ENOTTY])
def test_the_data_size_fails_with_the_devices_errno(number: int) -> None:
    device = Scripted()
    with Program(device) as program:
        device.fails["state_size"] = refusal(number)
        assert _data_size(program) == (number, 0)
        assert program.state() is State.RUNNING


class Odd(Scripted):
    def __init__(self, size: object) -> None:
        super().__init__()
        self.size = size

    def state_size(self) -> int:
        return self.size  # type: ignore[return-value]  # what it is, the test decides


@pytest.mark.parametrize(("size", "told"), [(-5, 0), (1 << 70, (1 << 64) - 1), (True, 1)])
def test_a_data_size_is_fitted_into_64_bits(size: int, told: int) -> None:
    with Program(Odd(size)) as program:
        assert _data_size(program) == (0, told)


def test_a_data_size_that_is_no_number_is_a_bug_of_the_device() -> None:
    with Program(Odd("many")) as program:
        assert _data_size(program) == (errno.EIO, 0)
        assert program.state() is State.ERROR


# MIG_DEVICE_STATE.


def test_get_needs_a_payload_that_can_be_read_and_written() -> None:
    header = bytes(vfio.DeviceFeature(argsz=16, flags=GET | MIG_DEVICE_STATE))
    with Program() as program, Pages("rw", "") as no_access, Pages("rw", "r") as read_only:
        for pages in (no_access, read_only):
            program.caller.write(pages.page(1) - 8, header)
            assert program.at(FEATURE, pages.page(1) - 8) == errno.EFAULT


def test_get_tells_the_state_and_opens_nothing() -> None:
    with Program() as program:
        for state in (State.STOP_COPY, State.RESUMING, State.STOP):
            program.go(state)
            answer = program.feature(GET | MIG_DEVICE_STATE, mig_state(99, fd=5))
            assert answer == (0, mig_state(state, fd=-1))
        assert len(program.caller.table) == 2


def test_get_works_in_error() -> None:
    with Program() as program:
        program.served.migration.fail()
        assert program.feature(GET | MIG_DEVICE_STATE, bytes(8)) == (0, mig_state(0, -1))


def test_a_set_that_cannot_read_its_payload_does_nothing() -> None:
    with Program() as program, Pages("rw", "") as pages:
        header = bytes(vfio.DeviceFeature(argsz=16, flags=SET | MIG_DEVICE_STATE))
        program.caller.write(pages.page(1) - 8, header)
        assert program.at(FEATURE, pages.page(1) - 8) == errno.EFAULT
        assert program.state() is State.RUNNING


def test_a_success_writes_the_target_back_and_minus_one() -> None:
    with Program() as program:
        assert program.feature(SET | MIG_DEVICE_STATE, mig_state(1)) == (0, mig_state(1, -1))
        assert program.feature(SET | MIG_DEVICE_STATE, mig_state(1)) == (0, mig_state(1, -1))


@pytest.mark.parametrize(
    "number",
    [errno.EIO, errno.EOPNOTSUPP, errno.ENOTTY, errno.EFAULT, errno.EINVAL, errno.ETIMEDOUT],
)
def test_a_failed_set_leaves_the_request_and_passes_the_drivers_errno_on(number: int) -> None:
    device = Scripted()
    with Program(device) as program:
        device.fails["save"] = refusal(number)
        reply = program.set_state(State.STOP_COPY)
        assert reply == (number, State.STOP_COPY, -1)
        assert program.state() is State.STOP


@pytest.mark.parametrize("requested", [0, 8, 9, 0xFFFF_FFFF])
def test_a_refused_target_changes_nothing_and_leaves_the_session_open(requested: int) -> None:
    with Program() as program:
        fd = program.go(State.PRE_COPY)
        assert program.set_state(requested) == (errno.EINVAL, requested, -1)
        assert program.state() is State.PRE_COPY
        program.go(State.STOP_COPY)
        assert program.read_all(fd) == b"the state"


@pytest.mark.parametrize("requested", [State.PRE_COPY, State.PRE_COPY_P2P])
def test_the_way_back_into_pre_copy_is_refused_at_once(requested: State) -> None:
    with Program() as program:
        fd = program.go(State.STOP_COPY)
        assert program.set_state(requested) == (errno.EINVAL, requested, -1)
        assert program.read_all(fd) == b"the state"
        program.go(State.RUNNING)
        program.go(requested)


@pytest.mark.parametrize(
    "target", [State.STOP_COPY, State.RESUMING, State.PRE_COPY, State.PRE_COPY_P2P]
)
def test_emfile_writes_nothing_though_the_device_is_there(target: State) -> None:
    with Program() as program:
        program.caller.full = True
        answer = program.feature(SET | MIG_DEVICE_STATE, mig_state(target))
        assert answer == (errno.EMFILE, mig_state(target))
        assert program.state() is target
        program.caller.full = False
        assert program.go(target) == -1
        program.go(State.RUNNING if target in {State.PRE_COPY, State.PRE_COPY_P2P} else State.STOP)
        assert program.go(target) == 10


def test_efault_at_the_end_gives_the_number_back_and_the_device_is_there() -> None:
    request = bytes(vfio.DeviceFeature(argsz=16, flags=SET | MIG_DEVICE_STATE))
    with Program() as program, Pages("rw") as pages:
        address = pages.read_only(request + mig_state(State.STOP_COPY))
        assert program.at(FEATURE, address) == errno.EFAULT
        assert program.caller.table == {}
        assert program.state() is State.STOP_COPY
        program.go(State.STOP)
        assert program.read_all(program.go(State.STOP_COPY)) == b"the state"


def test_efault_hides_the_drivers_errno() -> None:
    request = bytes(vfio.DeviceFeature(argsz=16, flags=SET | MIG_DEVICE_STATE))
    device = Scripted()
    with Program(device) as program, Pages("rw") as pages:
        device.fails["stop"] = refusal(errno.EBUSY)
        address = pages.read_only(request + mig_state(State.STOP))
        assert program.at(FEATURE, address) == errno.EFAULT
        assert program.state() is State.RUNNING_P2P


# Before BIND.


def test_before_the_binding_everything_but_the_binding_is_refused() -> None:
    program = Program(bound=False)
    requests = [0x3B6B, 0x3B6C, 0x3B6D, 0x3B6F, FEATURE, 0x3B77, 0x3B78, 0x3B79, 0x3B00, 0x5401]
    for number in requests:
        assert program.at(number, 0) == errno.EINVAL, hex(number)
    assert program.bind().errno == 0
    assert program.at(0x3B00, 0) == program.at(0x3B79, 0) == errno.ENOTTY
    program.close()


def test_a_client_finds_the_dialect_out_without_changing_anything() -> None:
    for dialect, second in ((LANDED, 0), (V6, errno.EINVAL)):
        device = Scripted()
        with Program(device, dialect) as program:
            assert program.feature(PROBE | MIGRATION).errno == 0
            both = PROBE | GET | SET | MIG_DEVICE_STATE
            assert program.feature(both).errno == second
            assert device.log == ["start"]
