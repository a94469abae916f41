/*
 * DMA logging in the landed dialect. vfio0, commanded, writes 64 bytes wherever it is told to.
 * BUS is mapped for 64 pages; the device is attached to it.
 */
#include "check.h"

struct start { uint32_t argsz, flags; uint64_t page_size; uint32_t num_ranges, reserved; uint64_t ranges; };
struct report { uint32_t argsz, flags; uint64_t iova, length, page_size, bitmap; };
struct range { uint64_t iova, length; };
struct ioas_map { uint32_t size, flags, ioas_id, reserved; uint64_t user_va, length, iova; };

#define BUS ((uint64_t)0x40000000)
#define PAGE 4096ull
#define PAGES 64ull

static int open_attached(void)
{
	int dev = open_device(0), iommufd = open_iommu();
	uint32_t alloc[3] = { 12 };
	struct ioas_map map = { .size = sizeof(map), .flags = 7, .length = PAGES * PAGE, .iova = BUS };
	struct attach attach = { .argsz = 12 };
	void *memory = mmap(NULL, map.length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	need(!bind_to(dev, iommufd), "BIND_IOMMUFD");
	enable_dma(dev);
	need(!ioctl(iommufd, IOMMU_IOAS_ALLOC, alloc), "IOAS_ALLOC");
	map.ioas_id = attach.pt_id = alloc[2];
	map.user_va = (uintptr_t)memory;
	need(!ioctl(iommufd, IOMMU_IOAS_MAP, &map), "IOAS_MAP");
	need(!ioctl(dev, DEVICE_ATTACH_IOMMUFD_PT, &attach), "ATTACH");
	close(iommufd);
	return dev;
}

static long start_log(int dev, uint64_t page_size, uint32_t count, const struct range *ranges)
{
	struct start argument = {
		32, SET | DMA_LOGGING_START, page_size, count, 0, (uintptr_t)ranges,
	};

	return ioctl(dev, DEVICE_FEATURE, &argument);
}

static long stop_log(int dev)
{
	return feature(dev, SET | DMA_LOGGING_STOP, 8);
}

static long report_log(int dev, uint64_t iova, uint64_t length, uint64_t page_size, void *bitmap)
{
	struct report argument = {
		40, GET | DMA_LOGGING_REPORT, iova, length, page_size, (uintptr_t)bitmap,
	};

	return ioctl(dev, DEVICE_FEATURE, &argument);
}

static void dma_write(int dev, uint64_t iova)
{
	uint32_t result;

	command(dev, 0x18, &iova, 8);
	need(pread(dev, &result, 4, bar0_offset(dev) + 0x20) == 4 && !result, "a DMA write");
}

/* Report into a cleared bitmap of two words, and say what came. */
static void say_report(int dev, const char *what, uint64_t iova, uint64_t length, uint64_t page_size)
{
	uint64_t bitmap[3] = { 0, 0, 0x5555 };
	long result = report_log(dev, iova, length, page_size, bitmap);

	say("%s = %s, %#llx %#llx%s", what, outcome(result), (unsigned long long)bitmap[0],
	    (unsigned long long)bitmap[1], bitmap[2] == 0x5555 ? "" : ", and beyond");
}

static void section_start(void)
{
	int dev = open_attached();
	struct range one = { BUS, PAGE }, many[257], overlapping[] = {
		{ BUS, 2 * PAGE }, { BUS + 4 * PAGE, PAGE }, { BUS + PAGE, PAGE },
	};
	struct start argument = {
		32, SET | DMA_LOGGING_START, PAGE, 1, 0, (uintptr_t)&one,
	};

	for (uint64_t at = 0; at < 257; at++)
		many[at] = (struct range){ BUS + 2 * at * PAGE, PAGE };
	say("argsz 31 = %s", outcome(feature(dev, SET | DMA_LOGGING_START, 31)));
	say("GET = %s", outcome(feature(dev, GET | DMA_LOGGING_START, 32)));
	say("payload cut at 16 bytes = %s",
	    outcome(ioctl(dev, DEVICE_FEATURE, at_edge(&argument, 32, 24))));
	say("no ranges = %s", outcome(start_log(dev, PAGE, 0, &one)));
	say("257 ranges = %s", outcome(start_log(dev, PAGE, 257, many)));
	say("ranges nowhere = %s", outcome(start_log(dev, PAGE, 1, nowhere)));
	say("the second of two nowhere = %s",
	    outcome(start_log(dev, PAGE, 2, at_edge(&one, sizeof(one), sizeof(one)))));
	say("iova inside a page = %s", outcome(start_log(dev, PAGE, 1, &(struct range){ 8, PAGE })));
	say("length inside a page = %s", outcome(start_log(dev, PAGE, 1, &(struct range){ 0, 8 })));
	say("not a multiple of a page_size of 8192 = %s", outcome(start_log(dev, 8192, 1, &one)));
	say("ending at 2^64 = %s",
	    outcome(start_log(dev, PAGE, 1, &(struct range){ -PAGE, PAGE })));
	say("ending behind 2^64 = %s",
	    outcome(start_log(dev, PAGE, 1, &(struct range){ -PAGE, 2 * PAGE })));
	say("overlapping = %s", outcome(start_log(dev, PAGE, 3, overlapping)));
	say("not started: REPORT = %s", outcome(report_log(dev, BUS, PAGE, PAGE, many)));
	say("read-only memory = %s", outcome(ioctl(dev, DEVICE_FEATURE, read_only(&argument, 32))));
	say("not started: REPORT = %s", outcome(report_log(dev, BUS, PAGE, PAGE, many)));
	say("256 ranges = %s", outcome(start_log(dev, PAGE, 256, many)));
	say("again = %s", outcome(start_log(dev, PAGE, 1, &one)));
	say("STOP = %s", outcome(stop_log(dev)));
	say("STOP again = %s", outcome(stop_log(dev)));
	say("START = %s, page_size %llu", outcome(ioctl(dev, DEVICE_FEATURE, &argument)),
	    (unsigned long long)argument.page_size);
	close(dev);
	dev = open_attached();
	say("after the last close, REPORT = %s", outcome(report_log(dev, BUS, PAGE, PAGE, many)));
	close(dev);
}

static void section_report_arguments(void)
{
	int dev = open_attached();
	uint64_t bitmap[2] = { 0 };
	struct report argument = {
		40, GET | DMA_LOGGING_REPORT, BUS, PAGE, PAGE, (uintptr_t)bitmap,
	};

	need(!start_log(dev, PAGE, 1, &(struct range){ BUS, PAGES * PAGE }), "START");
	say("argsz 39 = %s", outcome(feature(dev, GET | DMA_LOGGING_REPORT, 39)));
	say("SET = %s", outcome(feature(dev, SET | DMA_LOGGING_REPORT, 40)));
	say("payload cut at 24 bytes = %s",
	    outcome(ioctl(dev, DEVICE_FEATURE, at_edge(&argument, 40, 32))));
	say("page_size 0 = %s", outcome(report_log(dev, BUS, PAGE, 0, bitmap)));
	say("page_size 2048 = %s", outcome(report_log(dev, BUS, PAGE, 2048, bitmap)));
	say("page_size 12288 = %s", outcome(report_log(dev, BUS, PAGE, 12288, bitmap)));
	say("ending behind 2^64 = %s", outcome(report_log(dev, -PAGE, 2 * PAGE, PAGE, bitmap)));
	say("bitmap nowhere = %s", outcome(report_log(dev, BUS, PAGE, PAGE, nowhere)));
	say("read-only bitmap = %s", outcome(report_log(dev, BUS, PAGE, PAGE, read_only(bitmap, 16))));
	say("read-only argument = %s", outcome(ioctl(dev, DEVICE_FEATURE, read_only(&argument, 40))));
	say("STOP = %s", outcome(stop_log(dev)));
	say("REPORT = %s", outcome(report_log(dev, BUS, PAGE, PAGE, bitmap)));
	close(dev);
}

static void section_bits(void)
{
	int dev = open_attached();
	uint64_t kept[2] = { 0x100, 0 };
	struct range ranges[] = { { BUS, 8 * PAGE }, { BUS + 16 * PAGE, 8 * PAGE } };

	need(!start_log(dev, PAGE, 2, ranges), "START");
	say_report(dev, "nothing was written", BUS, PAGES * PAGE, PAGE);
	dma_write(dev, BUS + 3 * PAGE);
	dma_write(dev, BUS + 5 * PAGE - 32);
	say_report(dev, "one inside a page, one over its end", BUS, PAGES * PAGE, PAGE);
	say_report(dev, "reported already", BUS, PAGES * PAGE, PAGE);
	dma_write(dev, BUS);
	dma_write(dev, BUS + 8 * PAGE - 64);
	dma_write(dev, BUS + 8 * PAGE);
	dma_write(dev, BUS + 15 * PAGE);
	dma_write(dev, BUS + 16 * PAGE - 32);
	dma_write(dev, BUS + 24 * PAGE - 64);
	dma_write(dev, BUS + 24 * PAGE);
	say_report(dev, "at the edges of both ranges", BUS, PAGES * PAGE, PAGE);
	dma_write(dev, BUS + 3 * PAGE);
	dma_write(dev, BUS + 6 * PAGE);
	say_report(dev, "bits count from the report's iova", BUS + 3 * PAGE, 2 * PAGE, PAGE);
	say_report(dev, "outside of it nothing was cleared", BUS, PAGES * PAGE, PAGE);
	dma_write(dev, BUS + 3 * PAGE);
	say_report(dev, "pages of 8192", BUS, PAGES * PAGE, 8192);
	dma_write(dev, BUS + 3 * PAGE);
	say_report(dev, "one page of 1 MiB", BUS, PAGES * PAGE, 1 << 20);
	dma_write(dev, BUS + 3 * PAGE);
	say("into a bitmap with bits = %s", outcome(report_log(dev, BUS, PAGES * PAGE, PAGE, kept)));
	say("they stay: %#llx %#llx", (unsigned long long)kept[0], (unsigned long long)kept[1]);
	close(dev);
}

static void section_states(void)
{
	int dev = open_attached();
	struct mig_state argument = { 16, SET | MIG_DEVICE_STATE, STOP, -1 };

	need(!start_log(dev, PAGE, 1, &(struct range){ BUS, PAGES * PAGE }), "START");
	dma_write(dev, BUS + 2 * PAGE);
	need(!ioctl(dev, DEVICE_FEATURE, &argument), "SET");
	say_report(dev, "in STOP", BUS, PAGES * PAGE, PAGE);
	dma_write(dev, BUS + PAGE);
	need(!ioctl(dev, DEVICE_RESET), "RESET");
	say_report(dev, "after a reset", BUS, PAGES * PAGE, PAGE);
	close(dev);
}

static const struct section sections[] = {
	{ "START and STOP", section_start },
	{ "REPORT: arguments", section_report_arguments },
	{ "REPORT: bits", section_bits },
	{ "any state", section_states },
	{ NULL, NULL },
};

int main(int argc, char **argv)
{
	return run_sections(sections, argc, argv);
}
