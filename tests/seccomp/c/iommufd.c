/*
 * Page tables of an iommufd, copies, files, and IOMMU dirty tracking; and what memory a device
 * reaches through them. vfio0, commanded, writes 64 bytes and reads 16 wherever it is told to.
 */
#include "iommufd.h"

#define IOMMU_IOAS_COPY 0x3B83
#define IOMMU_GET_HW_INFO 0x3B8A
#define IOMMU_HWPT_SET_DIRTY_TRACKING 0x3B8B
#define IOMMU_HWPT_GET_DIRTY_BITMAP 0x3B8C
#define IOMMU_IOAS_MAP_FILE 0x3B8F

struct ioas_map_file {
	uint32_t size, flags, ioas_id;
	int32_t fd;
	uint64_t start, length, iova;
};
struct ioas_copy {
	uint32_t size, flags, dst_ioas_id, src_ioas_id;
	uint64_t length, dst_iova, src_iova;
};
struct hw_info {
	uint32_t size, flags, dev_id, data_len;
	uint64_t data_uptr;
	uint32_t out_data_type;
	uint8_t out_max_pasid_log2, reserved[3];
	uint64_t out_capabilities;
};
struct set_dirty { uint32_t size, flags, hwpt_id, reserved; };
struct get_dirty {
	uint32_t size, hwpt_id, flags, reserved;
	uint64_t iova, length, page_size, data;
};
struct start { uint32_t argsz, flags; uint64_t page_size; uint32_t num_ranges, reserved; uint64_t ranges; };
struct report { uint32_t argsz, flags; uint64_t iova, length, page_size, bitmap; };
struct range { uint64_t iova, length; };

static long map_file(uint32_t flags, int fd, uint64_t start, uint64_t length, uint64_t iova)
{
	struct ioas_map_file argument = {
		.size = 40, .flags = flags, .ioas_id = ioas, .fd = fd, .start = start,
		.length = length, .iova = iova,
	};

	return ioctl(iommufd, IOMMU_IOAS_MAP_FILE, &argument);
}

static long copy(uint32_t to, uint32_t flags, uint64_t from_iova, uint64_t length, uint64_t iova)
{
	struct ioas_copy argument = {
		.size = 40, .flags = flags, .dst_ioas_id = to, .src_ioas_id = ioas,
		.length = length, .dst_iova = iova, .src_iova = from_iova,
	};

	return ioctl(iommufd, IOMMU_IOAS_COPY, &argument);
}

#define dma_write(iova) dma(dev, 0x18, iova)
#define dma_read(iova) dma_text(dev, iova)

static void say_hwpt(const char *what, struct hwpt_alloc argument)
{
	long result;

	argument.size = 48;
	result = ioctl(iommufd, IOMMU_HWPT_ALLOC, &argument);
	say("%s = %s, id %s", what, outcome(result), argument.out_hwpt_id ? "given" : "none");
}

static void section_hwpt_alloc(void)
{
	struct hwpt_alloc argument = { .size = 23 };
	uint32_t plain;

	begin();
	say("size 23 = %s", outcome(ioctl(iommufd, IOMMU_HWPT_ALLOC, &argument)));
	argument = (struct hwpt_alloc){ .size = 48, .dev_id = devid, .pt_id = ioas };
	say("no memory = %s", outcome(ioctl(iommufd, IOMMU_HWPT_ALLOC, NULL)));
	say("cut at 24 bytes = %s",
	    outcome(ioctl(iommufd, IOMMU_HWPT_ALLOC, at_edge(&argument, 48, 24))));
	say_hwpt("reserved field set", (struct hwpt_alloc){ .reserved = 1, .data_len = 1 });
	say_hwpt("data without a type", (struct hwpt_alloc){ .dev_id = devid, .data_len = 4 });
	say_hwpt("a type without data", (struct hwpt_alloc){ .dev_id = devid, .data_type = 1 });
	say_hwpt("unknown device", (struct hwpt_alloc){ .dev_id = 9999, .pt_id = 9999 });
	say_hwpt("an IOAS as the device", (struct hwpt_alloc){ .dev_id = ioas, .pt_id = ioas });
	say_hwpt("unknown IOAS", (struct hwpt_alloc){ .dev_id = devid, .pt_id = 9999 });
	say_hwpt("the device as the IOAS", (struct hwpt_alloc){ .dev_id = devid, .pt_id = devid });
	argument.flags = 16;
	say_hwpt("unknown flag", argument);
	argument.flags = 1;
	say_hwpt("NEST_PARENT", argument);
	argument.flags = 8;
	say_hwpt("PASID", argument);
	argument.flags = 4;
	say_hwpt("a fault queue", argument);
	argument.flags = 0;
	argument.data_type = argument.data_len = 4;
	say_hwpt("a type and data", argument);
	argument.data_type = argument.data_len = 0;
	say("read-only memory = %s",
	    outcome(ioctl(iommufd, IOMMU_HWPT_ALLOC, read_only(&argument, 48))));
	say("no flags = %s", outcome(new_hwpt(0, &plain)));
	argument.pt_id = plain;
	say_hwpt("a page table as the IOAS", argument);
	argument.pt_id = ioas;
	argument.flags = TRACKING;
	say_hwpt("DIRTY_TRACKING", argument);
	end();
}

static void say_hw_info(const char *what, struct hw_info argument)
{
	long result;

	argument.size = 40;
	argument.out_data_type = argument.out_max_pasid_log2 = 9;
	result = ioctl(iommufd, IOMMU_GET_HW_INFO, &argument);
	say("%s = %s, data_len %u type %u pasid %u capabilities %#llx", what, outcome(result),
	    argument.data_len, argument.out_data_type, argument.out_max_pasid_log2,
	    (unsigned long long)argument.out_capabilities);
}

static void section_get_hw_info(void)
{
	struct hw_info argument = { .size = 31 };
	char data[9] = "xxxxxxxx";

	begin();
	say("size 31 = %s", outcome(ioctl(iommufd, IOMMU_GET_HW_INFO, &argument)));
	argument = (struct hw_info){ .size = 40, .dev_id = devid };
	say_hw_info("a flag", (struct hw_info){ .flags = 1 });
	say_hw_info("reserved field set", (struct hw_info){ .reserved = { 0, 0, 1 } });
	say_hw_info("unknown device", (struct hw_info){ .dev_id = 9999 });
	say_hw_info("no room for data", argument);
	say("read-only memory = %s",
	    outcome(ioctl(iommufd, IOMMU_GET_HW_INFO, read_only(&argument, 40))));
	argument.data_len = 5;
	argument.data_uptr = (uintptr_t)data;
	say_hw_info("room for 5", argument);
	say("zeroed: %d %d, then %s", data[0], data[4], data + 5);
	argument.data_uptr = (uintptr_t)nowhere;
	say_hw_info("room nowhere", argument);
	end();
}

static void section_attach(void)
{
	uint32_t table, other, given, again;

	begin();
	need(!new_hwpt(0, &table) && !new_hwpt(TRACKING, &other), "HWPT_ALLOC");
	need(!map_at(ALL, anonymous(PAGE), PAGE, BUS), "IOAS_MAP");
	say("ATTACH = %s", outcome(attach(table, &given)));
	say("the same id: %s", yes_no(given == table));
	say("DMA = %s", failed(dma_write(BUS)));
	say("DESTROY it = %s", outcome(destroy(table)));
	say("ATTACH elsewhere = %s", outcome(attach(other, &given)));
	say("DMA = %s", failed(dma_write(BUS)));
	say("DESTROY the first = %s", outcome(destroy(table)));
	say("ATTACH to what is gone = %s", outcome(attach(table, NULL)));
	say("ATTACH to the device = %s", outcome(attach(devid, NULL)));
	say("DMA = %s", failed(dma_write(BUS)));
	say("ATTACH to the IOAS = %s", outcome(attach(ioas, &given)));
	say("a table of its own: %s", yes_no(given != ioas && given != other));
	say("ATTACH to the IOAS = %s", outcome(attach(ioas, &again)));
	say("the same table: %s", yes_no(again == given));
	say("DESTROY the other = %s", outcome(destroy(other)));
	say("DESTROY the IOAS = %s", outcome(destroy(ioas)));
	say("DESTROY the device = %s", outcome(destroy(devid)));
	say("DETACH = %s", outcome(ioctl(dev, DEVICE_DETACH_IOMMUFD_PT, &(struct attach){ .argsz = 8 })));
	say("DMA = %s", failed(dma_write(BUS)));
	say("DESTROY its table = %s", outcome(destroy(given)));
	say("DESTROY the IOAS = %s", outcome(destroy(ioas)));
	end();
}

static void section_copy(void)
{
	uint32_t target;
	char *memory = anonymous(4 * PAGE);
	struct ioas_copy argument = { .size = 39 };

	begin();
	target = new_ioas();
	need(!attach(target, NULL), "ATTACH");
	need(!map_at(ALL, memory, 2 * PAGE, BUS), "IOAS_MAP");
	need(!map_at(FIXED | READABLE, memory + 2 * PAGE, PAGE, BUS + 2 * PAGE), "IOAS_MAP");
	say("size 39 = %s", outcome(ioctl(iommufd, IOMMU_IOAS_COPY, &argument)));
	say("unknown flag = %s", outcome(copy(target, ALL | 8, BUS, PAGE, BUS)));
	say("nobody may use it = %s", outcome(copy(target, FIXED, BUS, PAGE, BUS)));
	say("length of all ones = %s", outcome(copy(target, ALL, BUS, UINT64_MAX, BUS)));
	say("length 0 = %s", outcome(copy(9999, ALL, BUS, 0, BUS)));
	say("from where nothing is = %s", outcome(copy(9999, ALL, BUS + 2 * PAGE, 2 * PAGE, BUS)));
	say("to an unknown id = %s", outcome(copy(9999, ALL, BUS, PAGE, BUS)));
	say("half a page = %s", outcome(copy(target, ALL, BUS, PAGE / 2, BUS)));
	say("to a reserved iova = %s", outcome(copy(target, ALL, BUS, PAGE, 0xFEE00000)));
	say("for writing what is for reading = %s", outcome(copy(target, ALL, BUS, 3 * PAGE, BUS)));
	say("from inside a page = %s", outcome(copy(target, ALL, BUS + 8, PAGE, BUS)));
	say("for reading = %s", outcome(copy(target, FIXED | READABLE, BUS, 3 * PAGE, BUS)));
	say("the same again = %s", outcome(copy(target, FIXED | READABLE, BUS, PAGE, BUS)));
	say("the middle = %s", outcome(copy(target, ALL, BUS + PAGE, PAGE, BUS + 8 * PAGE)));
	need(!unmap(BUS, 3 * PAGE), "IOAS_UNMAP");
	memcpy(memory + 2 * PAGE - 8, "over two mapping", 16);
	say("DMA read = %s", dma_read(BUS + 2 * PAGE - 8));
	say("DMA write = %s", failed(dma_write(BUS)));
	say("DMA write to the middle = %s", failed(dma_write(BUS + 8 * PAGE)));
	say("it is there: %s", written(memory + PAGE));
	end();
}

static void section_map_file(void)
{
	int fd = new_memfd(4 * PAGE, true), exe = open("/proc/self/exe", O_RDONLY), reader;
	char *memory = shared(fd, 4 * PAGE, 0), path[32];
	struct ioas_map_file argument = { .size = 39 };

	begin();
	need(!attach(ioas, NULL), "ATTACH");
	snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
	reader = open(path, O_RDONLY);
	need(reader >= 0, path);
	say("size 39 = %s", outcome(ioctl(iommufd, IOMMU_IOAS_MAP_FILE, &argument)));
	say("unknown flag = %s", outcome(map_file(ALL | 8, fd, 0, PAGE, BUS)));
	say("iova of all ones = %s", outcome(map_file(ALL, fd, 0, PAGE, UINT64_MAX)));
	say("nobody may use it = %s", outcome(map_file(FIXED, fd, 0, PAGE, BUS)));
	say("length 0 = %s", outcome(map_file(ALL, 900, 0, 0, BUS)));
	say("start + length too large = %s", outcome(map_file(ALL, 900, -PAGE, 2 * PAGE, BUS)));
	say("a number that is not open = %s", outcome(map_file(ALL, 900, 0, PAGE, BUS)));
	say("-1 = %s", outcome(map_file(ALL, -1, 0, PAGE, BUS)));
	say("a program = %s", outcome(map_file(FIXED | READABLE, exe, 0, PAGE, BUS)));
	say("the device = %s", outcome(map_file(ALL, dev, 0, PAGE, BUS)));
	say("the iommufd = %s", outcome(map_file(ALL, iommufd, 0, PAGE, BUS)));
	say("start inside a page = %s", outcome(map_file(ALL, fd, 8, PAGE, BUS)));
	say("over its end = %s", outcome(map_file(ALL, fd, 3 * PAGE, 2 * PAGE, BUS)));
	say("for reading only, to be written = %s", outcome(map_file(ALL, reader, 0, PAGE, BUS)));
	say("for reading only = %s", outcome(map_file(FIXED | READABLE, reader, 0, PAGE, BUS)));
	say("the same iova = %s", outcome(map_file(ALL, fd, 0, PAGE, BUS)));
	say("pages 1 to 3 = %s", outcome(map_file(ALL, fd, PAGE, 3 * PAGE, BUS + PAGE)));
	say("anywhere = %s", outcome(map_file(READABLE, fd, 0, PAGE, 0)));
	say("DMA write to page 0 = %s", failed(dma_write(BUS)));
	say("DMA write to page 2 = %s", failed(dma_write(BUS + 2 * PAGE)));
	say("it is there: %s", written(memory + 2 * PAGE));
	close(fd);
	munmap(memory, 4 * PAGE);
	say("DMA when the program has closed it = %s", failed(dma_write(BUS + 3 * PAGE)));
	close(reader);
	close(exe);
	end();
}

static uint32_t table;

static long track(uint32_t id, uint32_t flags)
{
	return ioctl(iommufd, IOMMU_HWPT_SET_DIRTY_TRACKING, &(struct set_dirty){ 16, flags, id, 0 });
}

static long get_dirty(uint32_t flags, uint64_t iova, uint64_t length, uint64_t size, void *bitmap)
{
	struct get_dirty argument = {
		48, table, flags, 0, iova, length, size, (uintptr_t)bitmap,
	};

	return ioctl(iommufd, IOMMU_HWPT_GET_DIRTY_BITMAP, &argument);
}

static void say_dirty(const char *what, uint32_t flags, uint64_t iova, uint64_t length, uint64_t size)
{
	uint64_t bitmap[2] = { 0, 0x5555 };
	long result = get_dirty(flags, iova, length, size, bitmap);

	say("%s = %s, %#llx%s", what, outcome(result), (unsigned long long)bitmap[0],
	    bitmap[1] == 0x5555 ? "" : ", and beyond");
}

static void begin_tracking(void)
{
	begin();
	need(!new_hwpt(TRACKING, &table) && !attach(table, NULL), "a page table");
	need(!map_at(ALL, anonymous(PAGES * PAGE), PAGES * PAGE, BUS), "IOAS_MAP");
}

static void section_tracking_arguments(void)
{
	uint32_t plain;
	uint64_t bitmap[2] = { 0 };
	struct set_dirty set = { .size = 15 };
	struct get_dirty get = { .size = 47 };

	begin_tracking();
	need(!new_hwpt(0, &plain), "HWPT_ALLOC");
	say("SET size 15 = %s", outcome(ioctl(iommufd, IOMMU_HWPT_SET_DIRTY_TRACKING, &set)));
	say("SET unknown flag = %s", outcome(track(9999, 2)));
	say("SET unknown id = %s", outcome(track(9999, 1)));
	say("SET of an IOAS = %s", outcome(track(ioas, 1)));
	say("SET of a table without tracking = %s", outcome(track(plain, 1)));
	say("SET off, which it is = %s", outcome(track(table, 0)));
	say("GET size 47 = %s", outcome(ioctl(iommufd, IOMMU_HWPT_GET_DIRTY_BITMAP, &get)));
	say("GET while off = %s", outcome(get_dirty(0, BUS, PAGE, PAGE, bitmap)));
	say("SET on = %s", outcome(track(table, 1)));
	say("GET unknown flag = %s", outcome(get_dirty(2, BUS, PAGE, PAGE, bitmap)));
	say("GET length 0 = %s", outcome(get_dirty(0, BUS, 0, PAGE, bitmap)));
	say("GET iova + length too large = %s", outcome(get_dirty(0, -PAGE, 2 * PAGE, PAGE, bitmap)));
	say("GET iova inside a page = %s", outcome(get_dirty(0, BUS + 8, PAGE, PAGE, bitmap)));
	say("GET length inside a page = %s", outcome(get_dirty(0, BUS, 8, PAGE, bitmap)));
	say("GET page_size 0 = %s", outcome(get_dirty(0, BUS, PAGE, 0, bitmap)));
	say("GET part of a page_size of 8192 = %s", outcome(get_dirty(0, BUS, PAGE, 8192, bitmap)));
	say("GET nowhere = %s", outcome(get_dirty(0, BUS, PAGE, PAGE, nowhere)));
	say("GET into read-only memory = %s",
	    outcome(get_dirty(0, BUS, PAGE, PAGE, read_only(bitmap, 16))));
	say("GET = %s", outcome(get_dirty(0, BUS, PAGE, PAGE, bitmap)));
	table = plain;
	say("GET of a table without tracking = %s", outcome(get_dirty(0, BUS, PAGE, PAGE, bitmap)));
	table = ioas;
	say("GET of an IOAS = %s", outcome(get_dirty(0, BUS, PAGE, PAGE, bitmap)));
	end();
}

static void section_tracking_bits(void)
{
	uint64_t kept[2] = { 0x100, 0 };

	begin_tracking();
	dma_write(BUS);
	need(!track(table, 1), "SET_DIRTY_TRACKING");
	say_dirty("written before", 0, BUS, PAGES * PAGE, PAGE);
	dma_write(BUS + 3 * PAGE);
	dma_write(BUS + 5 * PAGE - 32);
	dma_read(BUS + 9 * PAGE);
	say_dirty("not cleared", 1, BUS, PAGES * PAGE, PAGE);
	say_dirty("one inside a page, one over its end", 0, BUS, PAGES * PAGE, PAGE);
	say_dirty("told already", 0, BUS, PAGES * PAGE, PAGE);
	dma_write(BUS);
	dma_write(BUS + PAGES * PAGE - 64);
	say("over the last page = %s", failed(dma_write(BUS + PAGES * PAGE - 32)));
	say_dirty("the first and the last page", 0, BUS, PAGES * PAGE, PAGE);
	dma_write(BUS + 3 * PAGE);
	dma_write(BUS + 6 * PAGE);
	say_dirty("bits count from the iova", 0, BUS + 3 * PAGE, 2 * PAGE, PAGE);
	say_dirty("outside of it nothing was cleared", 0, BUS, PAGES * PAGE, PAGE);
	dma_write(BUS + 3 * PAGE);
	say_dirty("pages of 8192", 0, BUS, PAGES * PAGE, 8192);
	dma_write(BUS + 3 * PAGE);
	say_dirty("over the end of what is mapped", 0, BUS, 2 * PAGES * PAGE, PAGE);
	dma_write(BUS + 3 * PAGE);
	say_dirty("from before what is mapped", 0, BUS - PAGE, 8 * PAGE, PAGE);
	say("into a bitmap with bits = %s", outcome(get_dirty(0, BUS, PAGES * PAGE, PAGE, kept)));
	say("they stay: %#llx %#llx", (unsigned long long)kept[0], (unsigned long long)kept[1]);
	dma_write(BUS);
	need(!unmap(BUS, PAGES * PAGE), "IOAS_UNMAP");
	need(!map_at(ALL, anonymous(PAGES * PAGE), PAGES * PAGE, BUS), "IOAS_MAP");
	say_dirty("what was unmapped is forgotten", 0, BUS, PAGES * PAGE, PAGE);
	dma_write(BUS);
	need(!track(table, 0), "SET_DIRTY_TRACKING");
	say_dirty("off", 0, BUS, PAGES * PAGE, PAGE);
	end();
}

static void section_both_trackers(void)
{
	struct range range = { BUS + PAGE, 4 * PAGE };
	struct start start = { 32, SET | DMA_LOGGING_START, PAGE, 1, 0, (uintptr_t)&range };
	uint64_t bitmap = 0;
	struct report report = {
		40, GET | DMA_LOGGING_REPORT, BUS, PAGES * PAGE, PAGE, (uintptr_t)&bitmap,
	};

	begin_tracking();
	need(!track(table, 1), "SET_DIRTY_TRACKING");
	need(!ioctl(dev, DEVICE_FEATURE, &start), "START");
	dma_write(BUS + PAGE - 32);
	dma_write(BUS + 5 * PAGE - 32);
	say_dirty("the IOMMU", 0, BUS, PAGES * PAGE, PAGE);
	need(!ioctl(dev, DEVICE_FEATURE, &report), "REPORT");
	say("the device: %#llx", (unsigned long long)bitmap);
	bitmap = 0;
	dma_write(BUS + 2 * PAGE);
	need(!ioctl(dev, DEVICE_FEATURE, &report), "REPORT");
	say("the device: %#llx", (unsigned long long)bitmap);
	say_dirty("the IOMMU", 0, BUS, PAGES * PAGE, PAGE);
	end();
}

static void say_access(const char *what, char *memory)
{
	memcpy(memory + PAGE - 8, "read by a device", 16);
	say("%s: DMA read = %s", what, dma_read(BUS + PAGE - 8));
	say("%s: DMA write = %s", what, failed(dma_write(BUS + 2 * PAGE - 32)));
	say("%s: it is there: %s", what, written(memory + 2 * PAGE - 32));
	say("%s: DMA over the end = %s", what, failed(dma_write(BUS + 4 * PAGE - 32)));
	need(!unmap(BUS, 4 * PAGE), "IOAS_UNMAP");
	say("%s: DMA after UNMAP = %s", what, failed(dma_write(BUS)));
}

static void section_memory(void)
{
	int fd;
	char *memory;
	char path[] = "/tmp/guest-memory-XXXXXX";

	begin();
	need(!attach(ioas, NULL), "ATTACH");
	for (int sealed = 0; sealed < 2; sealed++) {
		fd = new_memfd(16 * PAGE, sealed);
		memory = shared(fd, 4 * PAGE, 8 * PAGE);
		need(!map_at(ALL, memory, 4 * PAGE, BUS), "IOAS_MAP");
		say_access(sealed ? "a sealed memfd" : "a memfd", memory);
		close(fd);
		need(!map_at(ALL, memory, 4 * PAGE, BUS), "IOAS_MAP");
		say_access(sealed ? "a sealed memfd that was closed" : "a memfd that was closed", memory);
	}
	memory = anonymous(4 * PAGE);
	need(!map_at(ALL, memory, 4 * PAGE, BUS), "IOAS_MAP");
	say_access("anonymous memory", memory);
	memory = mmap(NULL, 4 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	need(!map_at(ALL, memory, 4 * PAGE, BUS), "IOAS_MAP");
	say_access("shared anonymous memory", memory);
	fd = mkstemp(path);
	need(fd >= 0 && !unlink(path) && !ftruncate(fd, 4 * PAGE), "a file");
	memory = shared(fd, 4 * PAGE, 0);
	need(!map_at(ALL, memory, 4 * PAGE, BUS), "IOAS_MAP");
	say_access("a file", memory);
	close(fd);
	end();
}

static void section_memory_that_goes(void)
{
	int fd = new_memfd(4 * PAGE, false);
	char *memory = shared(fd, 4 * PAGE, 0);

	begin();
	need(!attach(ioas, NULL), "ATTACH");
	need(!map_at(ALL, memory, 4 * PAGE, BUS), "IOAS_MAP");
	need(!map_file(ALL, fd, 0, 4 * PAGE, BUS + 8 * PAGE), "IOAS_MAP_FILE");
	need(!ftruncate(fd, PAGE), "ftruncate");
	say("what is left of a file = %s", failed(dma_write(BUS)));
	say("what was cut off = %s", failed(dma_write(BUS + 2 * PAGE)));
	say("the same, named = %s", failed(dma_write(BUS + 10 * PAGE)));
	say("and read = %s", dma_read(BUS + 10 * PAGE));
	need(!unmap(BUS, 16 * PAGE), "IOAS_UNMAP");
	memory = anonymous(4 * PAGE);
	need(!map_at(ALL, memory, 4 * PAGE, BUS), "IOAS_MAP");
	munmap(memory + PAGE, PAGE);
	say("beside what the program unmapped = %s", failed(dma_write(BUS)));
	say("what the program unmapped = %s", failed(dma_write(BUS + PAGE)));
	close(fd);
	end();
}

static const struct section sections[] = {
	{ "HWPT_ALLOC", section_hwpt_alloc },
	{ "GET_HW_INFO", section_get_hw_info },
	{ "ATTACH to page tables", section_attach },
	{ "IOAS_COPY", section_copy },
	{ "IOAS_MAP_FILE", section_map_file },
	{ "dirty tracking: arguments", section_tracking_arguments },
	{ "dirty tracking: bits", section_tracking_bits },
	{ "both trackers", section_both_trackers },
	{ "memory", section_memory },
	{ "memory that goes", section_memory_that_goes },
	{ NULL, NULL },
};

int main(int argc, char **argv)
{
	return run_sections(sections, argc, argv);
}
