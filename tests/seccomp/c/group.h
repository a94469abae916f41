/*
 * The older way to a device: a group is put into a container and gives descriptors of its device
 * out. The device of group N is 0000:BB:00.0, where BB is N + 1.
 */
#include "dma.h"

#define GET_API_VERSION 0x3B64
#define CHECK_EXTENSION 0x3B65
#define GROUP_GET_STATUS 0x3B67
#define GROUP_UNSET_CONTAINER 0x3B69
#define TYPE1_GET_INFO 0x3B70
#define TYPE1_MAP_DMA 0x3B71
#define TYPE1_UNMAP_DMA 0x3B72
#define TYPE1_DIRTY_PAGES 0x3B75

#define TYPE1 1ul
#define TYPE1v2 3ul

#define MAP_READ 1u
#define MAP_WRITE 2u
#define MAP_VADDR 4u
#define UNMAP_BITMAP 1u
#define UNMAP_ALL 2u
#define UNMAP_VADDR 4u

/* Compiled with other names where the devices of groups 0 and 1 are called otherwise. */
#ifndef NAME_0
#define NAME_0 "0000:01:00.0"
#define NAME_1 "0000:02:00.0"
#endif

struct group_status { uint32_t argsz, flags; };
/* What GET_INFO tells, and the capabilities behind it. */
struct info {
	uint32_t argsz, flags;
	uint64_t iova_pgsizes;
	uint32_t cap_offset, pad;
	unsigned char rest[512];
};
struct cap { uint16_t id, version; uint32_t next; };
struct cap_avail { struct cap header; uint32_t avail; };
struct cap_ranges { struct cap header; uint32_t count, reserved; struct { uint64_t start, end; } at[]; };
struct dma_map { uint32_t argsz, flags; uint64_t vaddr, iova, size; };
struct bitmap { uint64_t pgsize, size, data; };
struct dma_unmap { uint32_t argsz, flags; uint64_t iova, size; struct bitmap bitmap; };

HELPER int open_container(void)
{
	int fd = open("/dev/vfio/vfio", O_RDWR | O_CLOEXEC);

	need(fd >= 0, "/dev/vfio/vfio");
	return fd;
}

HELPER int try_group(int number)
{
	char path[64];

	snprintf(path, sizeof(path), "/dev/vfio/%d", number);
	return open(path, O_RDWR | O_CLOEXEC);
}

HELPER int open_group(int number)
{
	int fd = try_group(number);

	need(fd >= 0, "a group");
	return fd;
}

HELPER long set_container(int group, int container)
{
	return ioctl(group, GROUP_SET_CONTAINER, &container);
}

HELPER long device_fd(int group, const char *name)
{
	return ioctl(group, GROUP_GET_DEVICE_FD, name);
}

/* A group in a container that has its IOMMU. */
HELPER int open_in(int container, int number, unsigned long type)
{
	int group = open_group(number);

	need(!set_container(group, container), "SET_CONTAINER");
	if (type)
		need(!ioctl(container, SET_IOMMU, type), "SET_IOMMU");
	return group;
}

HELPER long map_dma(int container, uint32_t flags, const void *memory, uint64_t iova, uint64_t size)
{
	struct dma_map argument = { 32, flags, (uintptr_t)memory, iova, size };

	return ioctl(container, TYPE1_MAP_DMA, &argument);
}

/* The bytes that were unmapped, or -1. */
HELPER long unmap_dma(int container, uint32_t flags, uint64_t iova, uint64_t size)
{
	struct dma_unmap argument = { .argsz = 24, .flags = flags, .iova = iova, .size = size };

	return ioctl(container, TYPE1_UNMAP_DMA, &argument) ? -1 : (long)argument.size;
}
