/*
 * A device, its iommufd and an IO address space, for the programs that go further than binding.
 */
#include "dma.h"

#define IOMMU_HWPT_ALLOC 0x3B89

struct ioas_map {
	uint32_t size, flags, ioas_id, reserved;
	uint64_t user_va, length, iova;
};
struct ioas_unmap { uint32_t size, ioas_id; uint64_t iova, length; };
struct destroy { uint32_t size, id; };
struct hwpt_alloc {
	uint32_t size, flags, dev_id, pt_id, out_hwpt_id, reserved, data_type, data_len;
	uint64_t data_uptr;
	uint32_t fault_id, reserved2;
};

#define FIXED 1u
#define WRITEABLE 2u
#define READABLE 4u
#define ALL (FIXED | WRITEABLE | READABLE)
#define TRACKING 2u

/* What every section works with. */
HELPER int dev, iommufd;
HELPER uint32_t devid, ioas;

HELPER uint32_t new_ioas(void)
{
	uint32_t alloc[3] = { 12 };

	need(!ioctl(iommufd, IOMMU_IOAS_ALLOC, alloc), "IOAS_ALLOC");
	return alloc[2];
}

HELPER void begin(void)
{
	struct bind bind = { .argsz = 16 };

	dev = open_device(0);
	iommufd = bind.iommufd = open_iommu();
	need(!ioctl(dev, DEVICE_BIND_IOMMUFD, &bind), "BIND_IOMMUFD");
	devid = bind.out_devid;
	enable_dma(dev);
	ioas = new_ioas();
}

HELPER void end(void)
{
	close(dev);
	close(iommufd);
}

HELPER long destroy(uint32_t id)
{
	return ioctl(iommufd, IOMMU_DESTROY, &(struct destroy){ 8, id });
}

HELPER long attach(uint32_t id, uint32_t *given)
{
	struct attach argument = { .argsz = 12, .pt_id = id };
	long result = ioctl(dev, DEVICE_ATTACH_IOMMUFD_PT, &argument);

	if (given)
		*given = argument.pt_id;
	return result;
}

HELPER long new_hwpt(uint32_t flags, uint32_t *id)
{
	struct hwpt_alloc argument = { .size = 48, .flags = flags, .dev_id = devid, .pt_id = ioas };
	long result = ioctl(iommufd, IOMMU_HWPT_ALLOC, &argument);

	*id = argument.out_hwpt_id;
	return result;
}

HELPER long map_at(uint32_t flags, void *memory, uint64_t length, uint64_t iova)
{
	struct ioas_map argument = {
		.size = 40, .flags = flags, .ioas_id = ioas, .user_va = (uintptr_t)memory,
		.length = length, .iova = iova,
	};

	return ioctl(iommufd, IOMMU_IOAS_MAP, &argument);
}

HELPER long unmap(uint64_t iova, uint64_t length)
{
	return ioctl(iommufd, IOMMU_IOAS_UNMAP, &(struct ioas_unmap){ 24, ioas, iova, length });
}
