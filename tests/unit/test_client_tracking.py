"""IOMMU dirty tracking on kernels that know only part of it."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

import pytest

from only_requests import OnlyRequests
from vfiomig.abi import iommufd as abi
from vfiomig.abi import vfio
from vfiomig.client.dma import AddressSpace
from vfiomig.client.requests import Requests
from vfiomig.client.transport import NO_FD

if TYPE_CHECKING:
    from vfiomig.abi.uapi import UapiStruct

ATTACH = vfio.VFIO_DEVICE_ATTACH_IOMMUFD_PT


class Kernel(OnlyRequests):
    """Notes each request. ``fails`` maps the n-th of a kind to its errno."""

    def __init__(self, fails: dict[tuple[int, int], int], iommufd: int = 4) -> None:
        super().__init__(iommufd)
        self.fails = fails
        self.ids = 0

    def ioctl(self, on: int, number: int, argument: UapiStruct | None) -> int:
        self.requests.append(number)
        if failure := self.fails.get((number, self.requests.count(number))):
            raise OSError(failure, os.strerror(failure))
        assert on == (self.device if number == ATTACH else self.iommufd)
        self.ids += 1
        if isinstance(argument, abi.HwInfo):
            argument.out_capabilities = abi.IOMMU_HW_CAP_DIRTY_TRACKING
        elif isinstance(argument, abi.IoasAlloc):
            argument.out_ioas_id = self.ids
        elif isinstance(argument, abi.HwptAlloc):
            assert (argument.dev_id, argument.flags) == (7, abi.IOMMU_HWPT_ALLOC_DIRTY_TRACKING)
            argument.out_hwpt_id = self.ids
        return 0


def space_on(kernel: Kernel, devid: int | None = 7) -> AddressSpace:
    return AddressSpace(Requests(kernel, "vfio0"), devid)


def test_the_device_moves_to_a_table_that_tracks_once() -> None:
    kernel = Kernel({})
    space = space_on(kernel)
    space.start_tracking()
    space.stop_tracking()
    space.start_tracking()
    assert kernel.requests == [
        abi.IOMMU_GET_HW_INFO,
        abi.IOMMU_IOAS_ALLOC,
        ATTACH,
        abi.IOMMU_HWPT_ALLOC,
        ATTACH,
        abi.IOMMU_HWPT_SET_DIRTY_TRACKING,
        abi.IOMMU_HWPT_SET_DIRTY_TRACKING,
        abi.IOMMU_HWPT_SET_DIRTY_TRACKING,
    ]


@pytest.mark.parametrize("number", [errno.ENOTTY, errno.EOPNOTSUPP])
def test_a_kernel_that_does_not_tell_of_its_iommu_cannot_track(number: int) -> None:
    space = space_on(
        Kernel({(abi.IOMMU_GET_HW_INFO, 1): number, (abi.IOMMU_GET_HW_INFO, 2): number})
    )
    assert not space.can_track()
    with pytest.raises(OSError, match="no IOMMU in front of it that can") as caught:
        space.start_tracking()
    assert caught.value.errno == errno.EOPNOTSUPP


def test_any_other_failure_of_the_question_is_told() -> None:
    space = space_on(Kernel({(abi.IOMMU_GET_HW_INFO, 1): errno.ENODEV}))
    with pytest.raises(OSError, match="No such device"):
        space.start_tracking()


def test_a_device_that_is_bound_to_no_iommufd_has_no_iommu_to_ask() -> None:
    kernel = Kernel({}, NO_FD)
    space = space_on(kernel, None)
    assert not space.can_track()
    with pytest.raises(OSError, match="start_dma_logging"):
        space.start_tracking()
    space.stop_tracking()
    assert kernel.requests == []


def test_a_table_that_the_device_cannot_move_to_is_given_back() -> None:
    kernel = Kernel({(ATTACH, 2): errno.EINVAL})
    space = space_on(kernel)
    with pytest.raises(OSError, match="Invalid argument"):
        space.start_tracking()
    assert kernel.requests[-2:] == [ATTACH, abi.IOMMU_DESTROY]
    assert not space.tracking
    space.start_tracking()  # another one is made
    assert kernel.requests.count(abi.IOMMU_HWPT_ALLOC) == 2


def test_nothing_is_reported_as_clean_that_was_not_tracked() -> None:
    kernel = Kernel({(abi.IOMMU_HWPT_SET_DIRTY_TRACKING, 1): errno.EIO})
    space = space_on(kernel)
    with pytest.raises(OSError, match="Input/output error"):
        space.start_tracking()
    with pytest.raises(OSError, match="start_iommu_tracking") as caught:
        space.report_tracking(0, 4096, 4096, clear=True)
    assert caught.value.errno == errno.EINVAL
    assert abi.IOMMU_HWPT_GET_DIRTY_BITMAP not in kernel.requests
