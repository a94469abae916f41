/*
 * Opening a device, binding it to an iommufd, IO address spaces, and what a device tells of
 * itself: everything before migration. Devices: vfio0, commanded, with a BAR0 of 256 bytes;
 * vfio1, any other.
 */
#include "check.h"

struct ioas_alloc { uint32_t size, flags, out_ioas_id, later; };
struct iova_ranges {
	uint32_t size, ioas_id, num_iovas, reserved;
	uint64_t allowed_iovas, out_iova_alignment;
};
struct iova_range { uint64_t start, last; };
struct ioas_map {
	uint32_t size, flags, ioas_id, reserved;
	uint64_t user_va, length, iova;
};
struct ioas_unmap { uint32_t size, ioas_id; uint64_t iova, length; };
struct destroy { uint32_t size, id; };
struct device_info { uint32_t argsz, flags, num_regions, num_irqs, cap_offset, pad; };
struct region_info { uint32_t argsz, flags, index, cap_offset; uint64_t size, offset; };
struct irq_info { uint32_t argsz, flags, index, count; };

#define FIXED 1
#define WRITEABLE 2
#define READABLE 4

#define BUS ((uint64_t)0x100000)	/* an IOVA that may be mapped */

static void say_kind(const char *path)
{
	struct stat status;
	long result = stat(path, &status);

	say("stat %s = %s%s", path, outcome(result),
	    result ? "" : S_ISCHR(status.st_mode) ? ", a character device" :
	    S_ISDIR(status.st_mode) ? ", a directory" : ", something else");
}

static void section_open(void)
{
	int fd = open("/dev/vfio/devices/vfio0", O_RDWR);

	say("open vfio0 = %s, %s", fd < 0 ? outcome(fd) : "a descriptor", fd_text(fd));
	close(fd);
	fd = open("/dev/vfio/devices/vfio0", O_RDWR | O_CLOEXEC);
	say("open vfio0 O_CLOEXEC = %s, %s", fd < 0 ? outcome(fd) : "a descriptor", fd_text(fd));
	say("F_GETFL access mode = %s",
	    (fcntl(fd, F_GETFL) & O_ACCMODE) == O_RDWR ? "O_RDWR" : "another");
	close(fd);
	say("open vfio7 = %s", outcome(open("/dev/vfio/devices/vfio7", O_RDWR)));
	say("open vfio0/x = %s", outcome(open("/dev/vfio/devices/vfio0/x", O_RDWR)));
	say("open vfio0 O_DIRECTORY = %s",
	    outcome(open("/dev/vfio/devices/vfio0", O_RDONLY | O_DIRECTORY)));
	say("open vfio0 O_CREAT O_EXCL = %s",
	    outcome(open("/dev/vfio/devices/vfio0", O_RDWR | O_CREAT | O_EXCL, 0600)));
	say("access vfio0 RW = %s", outcome(access("/dev/vfio/devices/vfio0", R_OK | W_OK)));
	say("access vfio7 = %s", outcome(access("/dev/vfio/devices/vfio7", F_OK)));
	say_kind("/dev/vfio/devices/vfio0");
	say_kind("/dev/vfio/devices");
	say_kind("/dev/iommu");
	say_kind("/dev/vfio/devices/vfio7");
	exhaust_descriptors();
	say("open vfio0 with a full table = %s", outcome(open("/dev/vfio/devices/vfio0", O_RDWR)));
	say("open iommu with a full table = %s", outcome(open("/dev/iommu", O_RDWR)));
	restore_descriptors();
}

static void section_before_bind(void)
{
	int dev = open_device(0), iommufd = open_iommu();
	struct device_info info = { .argsz = sizeof(info) };
	struct region_info region = { .argsz = sizeof(region) };
	struct irq_info irq = { .argsz = sizeof(irq) };
	struct attach attach = { .argsz = 12, .pt_id = 1 };
	int bound = open_bound(1);
	uint64_t bar0 = bar0_offset(bound);
	char byte = 0;

	say("GET_INFO = %s", outcome(ioctl(dev, DEVICE_GET_INFO, &info)));
	say("GET_REGION_INFO = %s", outcome(ioctl(dev, DEVICE_GET_REGION_INFO, &region)));
	say("GET_IRQ_INFO = %s", outcome(ioctl(dev, DEVICE_GET_IRQ_INFO, &irq)));
	say("RESET = %s", outcome(ioctl(dev, DEVICE_RESET)));
	say("ATTACH = %s", outcome(ioctl(dev, DEVICE_ATTACH_IOMMUFD_PT, &attach)));
	say("DETACH = %s", outcome(ioctl(dev, DEVICE_DETACH_IOMMUFD_PT, &attach)));
	say("PROBE MIGRATION = %s", outcome(feature(dev, PROBE | MIGRATION, 8)));
	say("FEATURE that cannot be read = %s", outcome(ioctl(dev, DEVICE_FEATURE, NULL)));
	say("unknown request = %s", outcome(ioctl(dev, UNKNOWN_REQUEST, 0)));
	say("pread of BAR0 = %s", outcome(pread(dev, &byte, 1, bar0)));
	say("pwrite of BAR0 = %s", outcome(pwrite(dev, &byte, 1, bar0)));
	close(bound);
	close(iommufd);
	close(dev);
}

static void say_bind(int dev, uint32_t argsz, uint32_t flags, int iommufd, uint64_t rest)
{
	struct { struct bind bind; uint64_t beyond[2]; } argument = {
		.bind = { .argsz = argsz, .flags = flags, .iommufd = iommufd },
		.beyond = { rest },
	};
	long result = ioctl(dev, DEVICE_BIND_IOMMUFD, &argument);

	say("argsz %u flags %u rest %s = %s, devid %s", argsz, flags, rest ? "set" : "zero",
	    outcome(result), argument.bind.out_devid ? "given" : "none");
}

static void section_bind_arguments(void)
{
	static const uint32_t sizes[] = { 16, 24, 40 };
	int dev = open_device(0), iommufd = open_iommu();
	struct bind argument = { .argsz = 16, .iommufd = iommufd };

	say_bind(dev, 0, 0, iommufd, 0);
	say_bind(dev, 15, 0, iommufd, 0);
	say_bind(dev, 16, 2, iommufd, 0);
	say_bind(dev, 40, 0, iommufd, 1);
	say("no memory = %s", outcome(ioctl(dev, DEVICE_BIND_IOMMUFD, NULL)));
	say("cut at 8 bytes = %s",
	    outcome(ioctl(dev, DEVICE_BIND_IOMMUFD, at_edge(&argument, 16, 8))));
	say("read-only memory = %s",
	    outcome(ioctl(dev, DEVICE_BIND_IOMMUFD, read_only(&argument, 16))));
	say("then PROBE MIGRATION = %s", outcome(feature(dev, PROBE | MIGRATION, 8)));
	close(dev);
	for (int at = 0; at < 3; at++) {
		dev = open_device(0);
		say_bind(dev, sizes[at], 0, iommufd, 0);
		close(dev);
	}
	close(iommufd);
}

static void section_bind_whom(void)
{
	int dev = open_device(0), other = open_device(0), iommufd = open_iommu(), copy;

	say("iommufd -1 = %s", outcome(bind_to(dev, -1)));
	say("a number that is not open = %s", outcome(bind_to(dev, 900)));
	say("standard output = %s", outcome(bind_to(dev, 1)));
	say("a device = %s", outcome(bind_to(dev, other)));
	say("BIND on the iommufd = %s", outcome(bind_to(iommufd, iommufd)));
	say("an iommufd = %s", outcome(bind_to(dev, iommufd)));
	say("a second time = %s", outcome(bind_to(dev, iommufd)));
	say("another open = %s", outcome(bind_to(other, iommufd)));
	say("PROBE MIGRATION by that other open = %s", outcome(feature(other, PROBE | MIGRATION, 8)));
	copy = dup(dev);
	close(dev);
	say("the other open while a copy of the first is there = %s",
	    outcome(bind_to(other, iommufd)));
	close(copy);
	say("the other open after the last close of the first = %s",
	    outcome(bind_to(other, iommufd)));
	close(iommufd);
	say("PROBE MIGRATION after the iommufd was closed = %s",
	    outcome(feature(other, PROBE | MIGRATION, 8)));
	close(other);
}

static void say_alloc(int iommufd, uint32_t size, uint32_t flags, uint32_t later)
{
	struct ioas_alloc argument = { .size = size, .flags = flags, .later = later };
	long result = ioctl(iommufd, IOMMU_IOAS_ALLOC, &argument);

	say("ALLOC size %u flags %u rest %s = %s, id %s", size, flags, later ? "set" : "zero",
	    outcome(result), argument.out_ioas_id ? "given" : "none");
}

static uint32_t alloc_ioas(int iommufd)
{
	struct ioas_alloc argument = { .size = 12 };

	need(ioctl(iommufd, IOMMU_IOAS_ALLOC, &argument) == 0, "IOAS_ALLOC");
	return argument.out_ioas_id;
}

static long destroy(int iommufd, uint32_t id)
{
	struct destroy argument = { .size = 8, .id = id };

	return ioctl(iommufd, IOMMU_DESTROY, &argument);
}

static void section_ioas_alloc_and_destroy(void)
{
	int iommufd = open_iommu(), other = open_iommu();
	struct destroy argument = { .size = 7 };
	uint32_t id = alloc_ioas(iommufd);

	say_alloc(iommufd, 11, 0, 0);
	say_alloc(iommufd, 12, 1, 0);
	say_alloc(iommufd, 16, 0, 5);
	say_alloc(iommufd, 12, 0, 0);
	say_alloc(iommufd, 16, 0, 0);
	say("ALLOC without memory = %s", outcome(ioctl(iommufd, IOMMU_IOAS_ALLOC, NULL)));
	say("DESTROY size 7 = %s", outcome(ioctl(iommufd, IOMMU_DESTROY, &argument)));
	say("DESTROY id 0 = %s", outcome(destroy(iommufd, 0)));
	say("DESTROY an unknown id = %s", outcome(destroy(iommufd, 9999)));
	say("DESTROY on another iommufd = %s", outcome(destroy(other, id)));
	say("DESTROY = %s", outcome(destroy(iommufd, id)));
	say("DESTROY again = %s", outcome(destroy(iommufd, id)));
	say("unknown request = %s", outcome(ioctl(iommufd, UNKNOWN_REQUEST, &argument)));
	say("a request of devices = %s", outcome(ioctl(iommufd, DEVICE_RESET)));
	close(iommufd);
	close(other);
}

static long attach_to(int dev, uint32_t argsz, uint32_t flags, uint32_t id, uint32_t *given)
{
	struct attach argument = { .argsz = argsz, .flags = flags, .pt_id = id };
	long result = ioctl(dev, DEVICE_ATTACH_IOMMUFD_PT, &argument);

	if (given)
		*given = argument.pt_id;
	return result;
}

/* Attach a device to an IOAS: only then it consists of pages, and not of all 64 bits. */
static int attached_device(int iommufd, uint32_t ioas)
{
	int dev = open_device(0);

	need(!bind_to(dev, iommufd) && !attach_to(dev, 12, 0, ioas, NULL), "a device");
	return dev;
}

static void section_ioas_iova_ranges(void)
{
	int iommufd = open_iommu(), dev;
	struct iova_range ranges[16] = { { 1, 1 } };
	struct iova_ranges argument = {
		.size = 31, .ioas_id = alloc_ioas(iommufd), .allowed_iovas = (uintptr_t)ranges,
	};
	uint32_t room;
	long result;

	dev = attached_device(iommufd, argument.ioas_id);
	say("size 31 = %s", outcome(ioctl(iommufd, IOMMU_IOAS_IOVA_RANGES, &argument)));
	argument.size = 32;
	argument.reserved = 1;
	say("reserved field set = %s", outcome(ioctl(iommufd, IOMMU_IOAS_IOVA_RANGES, &argument)));
	argument.reserved = 0;
	result = ioctl(iommufd, IOMMU_IOAS_IOVA_RANGES, &argument);
	room = argument.num_iovas;
	say("no room = %s, more needed: %s", outcome(result), yes_no(room > 0));
	argument.num_iovas = 16;
	result = ioctl(iommufd, IOMMU_IOAS_IOVA_RANGES, &argument);
	say("room for 16 = %s, the same number: %s, alignment %llu", outcome(result),
	    yes_no(argument.num_iovas == room), (unsigned long long)argument.out_iova_alignment);
	say("from 0: %s, in order: %s", yes_no(ranges[0].start == 0),
	    yes_no(room < 2 || ranges[0].last < ranges[1].start));
	argument.allowed_iovas = 8;
	say("ranges to nowhere = %s", outcome(ioctl(iommufd, IOMMU_IOAS_IOVA_RANGES, &argument)));
	argument.ioas_id = 9999;
	say("unknown id = %s", outcome(ioctl(iommufd, IOMMU_IOAS_IOVA_RANGES, &argument)));
	close(dev);
	close(iommufd);
}

static int map_fd;	/* the iommufd and IOAS that the next functions are about */
static uint32_t map_id;

static long map_at(uint32_t flags, const void *memory, uint64_t length, uint64_t iova)
{
	struct ioas_map argument = {
		.size = 40, .flags = flags, .ioas_id = map_id,
		.user_va = (uintptr_t)memory, .length = length, .iova = iova,
	};

	return ioctl(map_fd, IOMMU_IOAS_MAP, &argument);
}

static void section_ioas_map(void)
{
	char *memory = mmap(NULL, 4 * page_size, PROT_READ | PROT_WRITE,
			    MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	char *guarded = mmap(NULL, 2 * page_size, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	const int both = WRITEABLE | READABLE, all = FIXED | both;
	struct ioas_map argument = { .size = 39 };
	int dev;

	map_fd = open_iommu();
	map_id = alloc_ioas(map_fd);
	dev = attached_device(map_fd, map_id);
	munmap(guarded + page_size, page_size);
	say("size 39 = %s", outcome(ioctl(map_fd, IOMMU_IOAS_MAP, &argument)));
	say("unknown flag = %s", outcome(map_at(all | 8, memory, page_size, BUS)));
	say("neither readable nor writable = %s", outcome(map_at(FIXED, memory, page_size, BUS)));
	say("length 0 = %s", outcome(map_at(all, memory, 0, BUS)));
	say("length of all ones = %s", outcome(map_at(all, memory, UINT64_MAX, BUS)));
	say("iova of all ones = %s", outcome(map_at(all, memory, page_size, UINT64_MAX)));
	say("iova + length too large = %s",
	    outcome(map_at(all, memory, 2 * page_size, -(uint64_t)page_size)));
	say("memory + length too large = %s",
	    outcome(map_at(all, (void *)-page_size, 2 * page_size, BUS)));
	say("iova inside a page = %s", outcome(map_at(all, memory, page_size, BUS + 8)));
	say("memory inside a page = %s", outcome(map_at(all, memory + 8, page_size, BUS)));
	say("length of half a page = %s", outcome(map_at(all, memory, page_size / 2, BUS)));
	say("a reserved iova = %s", outcome(map_at(all, memory, page_size, 0xFEE00000)));
	say("memory that is not there = %s", outcome(map_at(all, (void *)page_size, page_size, BUS)));
	say("memory that ends half way = %s",
	    outcome(map_at(FIXED | READABLE, guarded, 2 * page_size, BUS)));
	say("read-only memory, to be written = %s", outcome(map_at(all, guarded, page_size, BUS)));
	say("read-only memory, to be read = %s",
	    outcome(map_at(FIXED | READABLE, guarded, page_size, BUS)));
	say("the same iova = %s", outcome(map_at(all, memory, page_size, BUS)));
	say("over its end = %s", outcome(map_at(all, memory, 2 * page_size, BUS - page_size)));
	say("beside it = %s", outcome(map_at(all, memory, 2 * page_size, BUS + page_size)));
	say("anywhere = %s", outcome(map_at(both, memory, page_size, 0)));
	map_id = 9999;
	say("unknown id = %s", outcome(map_at(all, memory, page_size, BUS)));
	close(dev);
	close(map_fd);
}

static void say_unmap(const char *what, uint64_t iova, uint64_t length)
{
	struct ioas_unmap argument = { .size = 24, .ioas_id = map_id, .iova = iova, .length = length };
	long result = ioctl(map_fd, IOMMU_IOAS_UNMAP, &argument);

	say("%s = %s, pages %lld", what, outcome(result),
	    result ? -1LL : (long long)argument.length / page_size);
}

static void section_ioas_unmap(void)
{
	char *memory = mmap(NULL, 4 * page_size, PROT_READ | PROT_WRITE,
			    MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	const int all = FIXED | WRITEABLE | READABLE;
	struct ioas_unmap argument = { .size = 23 };

	map_fd = open_iommu();
	map_id = alloc_ioas(map_fd);
	need(!map_at(all, memory, 4 * page_size, BUS), "IOAS_MAP");
	need(!map_at(all, memory, page_size, BUS + 8 * page_size), "IOAS_MAP");
	say("size 23 = %s", outcome(ioctl(map_fd, IOMMU_IOAS_UNMAP, &argument)));
	say_unmap("length 0", BUS, 0);
	say_unmap("iova of all ones", UINT64_MAX, page_size);
	say_unmap("length of all ones", BUS, UINT64_MAX);
	say_unmap("nothing there", BUS + 4 * page_size, page_size);
	say_unmap("the first page of a mapping", BUS, page_size);
	say_unmap("the last page of a mapping", BUS + 3 * page_size, page_size);
	say_unmap("up to the last page of all", UINT64_MAX - page_size + 1, page_size);
	need(!map_at(all, memory, 2 * page_size, BUS + 12 * page_size), "IOAS_MAP");
	need(!map_at(all, memory, 2 * page_size, BUS + 16 * page_size), "IOAS_MAP");
	say_unmap("half of one, and another", BUS + 13 * page_size, 5 * page_size);
	say_unmap("the other", BUS + 16 * page_size, 2 * page_size);
	need(!map_at(all, memory, 2 * page_size, BUS + 16 * page_size), "IOAS_MAP");
	say_unmap("one, and half of another", BUS + 12 * page_size, 5 * page_size);
	say_unmap("the one", BUS + 12 * page_size, 2 * page_size);
	say_unmap("the other", BUS + 16 * page_size, 2 * page_size);
	say_unmap("a whole mapping", BUS, 4 * page_size);
	say_unmap("the same again", BUS, 4 * page_size);
	say_unmap("a mapping and what is around it", BUS, 16 * page_size);
	say_unmap("everything, of nothing", 0, UINT64_MAX);
	need(!map_at(all, memory, 4 * page_size, BUS), "IOAS_MAP");
	say_unmap("everything", 0, UINT64_MAX);
	map_id = 9999;
	say_unmap("unknown id", BUS, page_size);
	close(map_fd);
}

static long detach(int dev, uint32_t argsz, uint32_t flags)
{
	struct attach argument = { .argsz = argsz, .flags = flags };

	return ioctl(dev, DEVICE_DETACH_IOMMUFD_PT, &argument);
}

static void section_attach(void)
{
	int dev = open_device(0), iommufd = open_iommu();
	struct bind bind = { .argsz = 16, .iommufd = iommufd };
	struct attach argument = { .argsz = 12 };
	uint32_t ioas = alloc_ioas(iommufd), other = alloc_ioas(iommufd), table = 0;

	need(!ioctl(dev, DEVICE_BIND_IOMMUFD, &bind), "BIND_IOMMUFD");
	argument.pt_id = ioas;
	say("ATTACH argsz 11 = %s", outcome(attach_to(dev, 11, 0, ioas, NULL)));
	say("ATTACH unknown flag = %s", outcome(attach_to(dev, 12, 2, ioas, NULL)));
	say("ATTACH with a pasid, argsz 12 = %s", outcome(attach_to(dev, 12, 1, ioas, NULL)));
	say("ATTACH unknown id = %s", outcome(attach_to(dev, 12, 0, 9999, NULL)));
	say("ATTACH to a device = %s", outcome(attach_to(dev, 12, 0, bind.out_devid, NULL)));
	say("ATTACH without memory = %s", outcome(ioctl(dev, DEVICE_ATTACH_IOMMUFD_PT, NULL)));
	say("ATTACH in read-only memory = %s",
	    outcome(ioctl(dev, DEVICE_ATTACH_IOMMUFD_PT, read_only(&argument, 12))));
	say("DESTROY the IOAS, not attached = %s", outcome(destroy(iommufd, other)));
	say("ATTACH = %s", outcome(attach_to(dev, 12, 0, ioas, &table)));
	say("a page table of its own: %s", yes_no(table && table != ioas));
	say("DESTROY the attached IOAS = %s", outcome(destroy(iommufd, ioas)));
	say("DESTROY the page table = %s", outcome(destroy(iommufd, table)));
	say("DESTROY the device = %s", outcome(destroy(iommufd, bind.out_devid)));
	other = alloc_ioas(iommufd);
	say("ATTACH to another IOAS = %s", outcome(attach_to(dev, 16, 0, other, NULL)));
	say("DESTROY the first IOAS = %s", outcome(destroy(iommufd, ioas)));
	say("DETACH argsz 7 = %s", outcome(detach(dev, 7, 0)));
	say("DETACH unknown flag = %s", outcome(detach(dev, 8, 2)));
	say("DETACH with a pasid, argsz 8 = %s", outcome(detach(dev, 8, 1)));
	say("DETACH = %s", outcome(detach(dev, 8, 0)));
	say("DETACH again = %s", outcome(detach(dev, 8, 0)));
	say("DESTROY the IOAS = %s", outcome(destroy(iommufd, other)));
	ioas = alloc_ioas(iommufd);
	say("ATTACH once more = %s", outcome(attach_to(dev, 12, 0, ioas, NULL)));
	close(dev);
	say("DESTROY the IOAS after the device was closed = %s", outcome(destroy(iommufd, ioas)));
	close(iommufd);
}

/* Have the device write 64 bytes at an IOVA, and say how that ended. */
static void say_dma(int dev, const char *what, uint64_t iova, const unsigned char *memory)
{
	uint32_t result = 0;

	command(dev, 0x18, &iova, 8);
	need(pread(dev, &result, 4, bar0_offset(dev) + 0x20) == 4, "a register");
	errno = result;
	say("%s = %s, memory %s", what, outcome(result ? -1 : 0),
	    memory[0] == 0xD1 && memory[63] == 0xD1 ? "written" : "as it was");
}

static void section_dma(void)
{
	unsigned char *memory = mmap(NULL, page_size, PROT_READ | PROT_WRITE,
				     MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	int dev = open_device(0);

	map_fd = open_iommu();
	map_id = alloc_ioas(map_fd);
	need(!bind_to(dev, map_fd), "BIND_IOMMUFD");
	need(!map_at(FIXED | WRITEABLE | READABLE, memory, page_size, BUS), "IOAS_MAP");
	say_dma(dev, "not attached", BUS, memory);
	need(!attach_to(dev, 12, 0, map_id, NULL), "ATTACH");
	say_dma(dev, "no bus master", BUS, memory);
	enable_dma(dev);
	say_dma(dev, "where nothing is mapped", BUS - page_size, memory);
	say_dma(dev, "over the end of the mapping", BUS + page_size - 32, memory);
	say_dma(dev, "mapped", BUS, memory);
	memset(memory, 0, page_size);
	need(!detach(dev, 8, 0), "DETACH");
	say_dma(dev, "detached", BUS, memory);
	need(!attach_to(dev, 12, 0, map_id, NULL), "ATTACH");
	say_unmap("unmap", BUS, page_size);
	need(!map_at(FIXED | READABLE, memory, page_size, BUS), "IOAS_MAP");
	say_dma(dev, "mapped for reading only", BUS, memory);
	close(map_fd);
	close(dev);
}

static void section_command(void)
{
	int dev = open_bound(0);
	uint64_t bar0 = bar0_offset(dev), at = region_offset(dev, 7) + 4;
	uint16_t command = 0xAAAA, off = 0, on = 2;
	uint32_t value = 0;

	need(pread(dev, &command, 2, at) == 2, "the command register");
	say("opened: %#x", command);
	say("read = %s", outcome(pread(dev, &value, 4, bar0 + 0x20)));
	need(pwrite(dev, &off, 2, at) == 2, "the command register");
	say("not decoded: read = %s", outcome(pread(dev, &value, 4, bar0 + 0x20)));
	say("not decoded: write = %s", outcome(pwrite(dev, &value, 4, bar0)));
	say("RESET = %s", outcome(ioctl(dev, DEVICE_RESET)));
	say("not decoded: read = %s", outcome(pread(dev, &value, 4, bar0 + 0x20)));
	need(pwrite(dev, &on, 2, at) == 2, "the command register");
	say("decoded: read = %s", outcome(pread(dev, &value, 4, bar0 + 0x20)));
	close(dev);
}

static void say_info(int dev, uint32_t argsz)
{
	struct device_info info = { .argsz = argsz, .cap_offset = 0x1234, .pad = 0x5678 };
	long result = ioctl(dev, DEVICE_GET_INFO, &info);

	say("argsz %u = %s, argsz %u flags %#x regions %u irqs %u, then %#x %#x", argsz,
	    outcome(result), info.argsz, info.flags, info.num_regions, info.num_irqs,
	    info.cap_offset, info.pad);
}

static void section_info(void)
{
	int dev = open_bound(0);
	struct device_info info = { .argsz = 16 };
	struct irq_info irq = { .argsz = 16 };

	say_info(dev, 15);
	say_info(dev, 16);
	say_info(dev, 20);
	say_info(dev, 24);
	say("no memory = %s", outcome(ioctl(dev, DEVICE_GET_INFO, NULL)));
	say("cut at 12 bytes = %s", outcome(ioctl(dev, DEVICE_GET_INFO, at_edge(&info, 16, 12))));
	say("read-only memory = %s", outcome(ioctl(dev, DEVICE_GET_INFO, read_only(&info, 16))));
	for (irq.index = 0; irq.index < 7; irq.index++) {
		irq.count = 0;
		long result = ioctl(dev, DEVICE_GET_IRQ_INFO, &irq);

		say("irq %u = %s, count %u", irq.index, outcome(result), irq.count);
	}
	say("unknown request = %s", outcome(ioctl(dev, UNKNOWN_REQUEST, 0)));
	say("a request of an iommufd = %s", outcome(ioctl(dev, IOMMU_IOAS_ALLOC, &info)));
	say("a request of data_fds = %s", outcome(ioctl(dev, MIG_GET_PRECOPY_INFO, &info)));
	say("a request of other files = %s", outcome(ioctl(dev, TIOCGWINSZ, &info)));
	say("FIONREAD = %s", outcome(ioctl(dev, FIONREAD, &info)));
	close(dev);
}

static void section_region_info(void)
{
	int dev = open_bound(0);
	struct region_info info = { .argsz = 31 };
	uint64_t last = 0;

	say("argsz 31 = %s", outcome(ioctl(dev, DEVICE_GET_REGION_INFO, &info)));
	for (uint32_t index = 0; index < 10; index++) {
		struct region_info one = { .argsz = sizeof(one), .index = index };
		long result = ioctl(dev, DEVICE_GET_REGION_INFO, &one);

		say("region %u = %s, flags %#x size %llu, behind the one before: %s", index,
		    outcome(result), one.flags, (unsigned long long)one.size,
		    yes_no(result == 0 && (index == 0 || one.offset > last)));
		last = one.offset;
	}
	info.argsz = sizeof(info);
	info.index = UINT32_MAX;
	say("index of all ones = %s", outcome(ioctl(dev, DEVICE_GET_REGION_INFO, &info)));
	info.index = 0;
	say("no memory = %s", outcome(ioctl(dev, DEVICE_GET_REGION_INFO, NULL)));
	say("cut at 16 bytes = %s",
	    outcome(ioctl(dev, DEVICE_GET_REGION_INFO, at_edge(&info, 32, 16))));
	say("read-only memory = %s",
	    outcome(ioctl(dev, DEVICE_GET_REGION_INFO, read_only(&info, 32))));
	close(dev);
}

static void section_region_access(void)
{
	static const size_t sizes[] = { 1, 2, 4, 8, 3, 16 };
	int dev = open_bound(0);
	uint64_t bar0 = bar0_offset(dev);
	unsigned char written[16], seen[16];
	ssize_t count;

	for (int at = 0; at < 6; at++) {
		size_t size = sizes[at];

		for (size_t i = 0; i < size; i++)
			written[i] = 0xA0 + 16 * at + i;
		memset(seen, 0, sizeof(seen));
		say("pwrite of %zu = %s", size, outcome(pwrite(dev, written, size, bar0 + 0x80 + 16 * at)));
		count = pread(dev, seen, size, bar0 + 0x80 + 16 * at);
		say("pread of %zu = %s, the same: %s", size, outcome(count),
		    yes_no(!memcmp(written, seen, size)));
	}
	count = pread(dev, seen, 1, bar0 + 0xB1);
	say("byte 1 of the 8 = %s, %#x", outcome(count), seen[0]);
	say("pread of 0 = %s", outcome(pread(dev, seen, 0, bar0)));
	say("pread of the last 4 of 8 = %s", outcome(pread(dev, seen, 8, bar0 + 252)));
	say("pwrite of the last 4 of 8 = %s", outcome(pwrite(dev, written, 8, bar0 + 252)));
	say("pread behind the end = %s", outcome(pread(dev, seen, 1, bar0 + 256)));
	say("pwrite behind the end = %s", outcome(pwrite(dev, seen, 1, bar0 + 256)));
	say("pread of a BAR that is not there = %s", outcome(pread(dev, seen, 1, bar0 + (1ULL << 40))));
	say("pread at a negative offset = %s", outcome(pread(dev, seen, 1, -1)));
	say("mmap = %s", outcome(mmap(NULL, page_size, PROT_READ, MAP_SHARED, dev, bar0) == MAP_FAILED
				 ? -1 : 0));
	close(dev);
}

/* Not with the fast filter: these calls show nothing that would tell them from other files'. */
static void section_no_stream(void)
{
	int dev = open_bound(0), iommufd = open_iommu();
	char byte = 0;

	say("pread at offset 0 = %s", outcome(pread(dev, &byte, 1, 0)));
	say("read = %s", outcome(read(dev, &byte, 1)));
	say("write = %s", outcome(write(dev, &byte, 1)));
	say("lseek = %s", outcome(lseek(dev, 8, SEEK_SET)));
	say("ftruncate = %s", outcome(ftruncate(dev, 0)));
	say("fsync = %s", outcome(fsync(dev)));
	say("read of an iommufd = %s", outcome(read(iommufd, &byte, 1)));
	say("write of an iommufd = %s", outcome(write(iommufd, &byte, 1)));
	close(iommufd);
	close(dev);
}

static void section_region_memory(void)
{
	int dev = open_bound(0);
	uint64_t bar0 = bar0_offset(dev), config;
	struct region_info info = { .argsz = sizeof(info), .index = 7 };
	unsigned char bytes[32] = "0123456789abcdef";
	struct iovec parts[2] = { { bytes, 5 }, { bytes + 5, 3 } };
	ssize_t count;

	need(!ioctl(dev, DEVICE_GET_REGION_INFO, &info), "GET_REGION_INFO");
	config = info.offset;
	say("pwrite from nowhere = %s", outcome(pwrite(dev, nowhere, 4, bar0 + 0x80)));
	say("pread to nowhere = %s", outcome(pread(dev, nowhere, 4, bar0 + 0x80)));
	say("pread to read-only memory = %s",
	    outcome(pread(dev, read_only(bytes, 16), 4, bar0 + 0x80)));
	say("pwrite from read-only memory = %s",
	    outcome(pwrite(dev, read_only(bytes, 16), 4, bar0 + 0x80)));
	say("pwritev of 5 and 3 = %s", outcome(pwritev(dev, parts, 2, bar0 + 0x80)));
	memset(bytes, 0, sizeof(bytes));
	count = preadv(dev, parts, 2, bar0 + 0x80);
	say("preadv of 5 and 3 = %s, %.8s", outcome(count), bytes);
	count = pread(dev, bytes, 4, config);
	say("config space = %s, vendor %02x%02x device %02x%02x", outcome(count), bytes[1], bytes[0],
	    bytes[3], bytes[2]);
	say("the last 4 of config space = %s", outcome(pread(dev, bytes, 4, config + 252)));
	say("over the end of config space = %s", outcome(pread(dev, bytes, 8, config + 252)));
	say("behind config space = %s", outcome(pread(dev, bytes, 1, config + 256)));
	say("pwrite of the vendor = %s", outcome(pwrite(dev, "\xff\xff", 2, config)));
	count = pread(dev, bytes, 2, config);
	say("which stays = %s, %02x%02x", outcome(count), bytes[1], bytes[0]);
	close(dev);
}

static const struct section sections[] = {
	{ "open", section_open },
	{ "before BIND", section_before_bind },
	{ "BIND: arguments", section_bind_arguments },
	{ "BIND: to whom", section_bind_whom },
	{ "IOAS_ALLOC and DESTROY", section_ioas_alloc_and_destroy },
	{ "IOAS_IOVA_RANGES", section_ioas_iova_ranges },
	{ "IOAS_MAP", section_ioas_map },
	{ "IOAS_UNMAP", section_ioas_unmap },
	{ "ATTACH and DETACH", section_attach },
	{ "DMA", section_dma },
	{ "the command register", section_command },
	{ "GET_INFO", section_info },
	{ "GET_REGION_INFO", section_region_info },
	{ "regions: sizes and edges", section_region_access },
	{ "regions: memory and config space", section_region_memory },
	{ "no stream", section_no_stream },
	{ NULL, NULL },
};

int main(int argc, char **argv)
{
	return run_sections(sections, argc, argv);
}
