/*
 * What the programs of this folder share: the kernel's interface as they use it, and one line of
 * output per observation. They know nothing of who serves their requests.
 *
 * A program is a list of sections. Each prints "## name", opens what it needs and closes it again,
 * so none depends on another. Arguments name sections to leave out.
 *
 * Structures and numbers: include/uapi/linux/vfio.h and iommufd.h of Linux 7.3, and for V6 the
 * patch "vfio: Define device migration protocol v2"; declared here, as an older header lacks some.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/sendfile.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define SET_IOMMU 0x3B66
#define GROUP_SET_CONTAINER 0x3B68
#define GROUP_GET_DEVICE_FD 0x3B6A
#define DEVICE_GET_INFO 0x3B6B
#define DEVICE_GET_REGION_INFO 0x3B6C
#define DEVICE_GET_IRQ_INFO 0x3B6D
#define DEVICE_RESET 0x3B6F
#define DEVICE_FEATURE 0x3B75
#define DEVICE_BIND_IOMMUFD 0x3B76
#define DEVICE_ATTACH_IOMMUFD_PT 0x3B77
#define DEVICE_DETACH_IOMMUFD_PT 0x3B78
#define MIG_GET_PRECOPY_INFO 0x3B79	/* on a data_fd */
#define DEVICE_MIG_SET_STATE 0x3B79	/* on a device, V6 */
#define IOMMU_DESTROY 0x3B80
#define IOMMU_IOAS_ALLOC 0x3B81
#define IOMMU_IOAS_IOVA_RANGES 0x3B84
#define IOMMU_IOAS_MAP 0x3B85
#define IOMMU_IOAS_UNMAP 0x3B86
#define UNKNOWN_REQUEST 0x3BFF

#define GET 0x10000u
#define SET 0x20000u
#define PROBE 0x40000u
#define MIGRATION 1u
#define MIG_DEVICE_STATE 2u
#define DMA_LOGGING_START 6u
#define DMA_LOGGING_STOP 7u
#define DMA_LOGGING_REPORT 8u
#define MIG_DATA_SIZE 9u
#define MIG_PRECOPY_INFOv2 12u

enum { ERROR, STOP, RUNNING, STOP_COPY, RESUMING, RUNNING_P2P, PRE_COPY, PRE_COPY_P2P };

struct bind { uint32_t argsz, flags; int32_t iommufd; uint32_t out_devid; uint64_t token; };
struct attach { uint32_t argsz, flags, pt_id, pasid; };
struct feature { uint32_t argsz, flags; uint64_t payload[5]; };
struct mig_state { uint32_t argsz, flags, device_state; int32_t data_fd; };
struct v6_state { uint32_t argsz, device_state; int32_t data_fd; uint32_t flags; };
struct precopy_info { uint32_t argsz, flags; uint64_t initial_bytes, dirty_bytes; };

/* Not every program uses every function here. */
#define HELPER static __attribute__((unused))

/* A data_fd that no request would answer: what a failure leaves alone still says so. */
#define UNTOUCHED (-77)

/* ---- Saying what is seen. ---- */

HELPER void say(const char *format, ...) __attribute__((format(printf, 1, 2)));

HELPER void say(const char *format, ...)
{
	va_list list;

	va_start(list, format);
	vprintf(format, list);
	va_end(list);
	putchar('\n');
	fflush(stdout);	/* whatever happens next, this was seen */
}

/* A result as text: the number, or the name of the errno. Valid for the next seven calls. */
HELPER const char *outcome(long result)
{
	static char texts[8][32];
	static unsigned int next;
	int number = errno;
	char *text = texts[next++ % 8];

	if (result >= 0)
		snprintf(text, sizeof(texts[0]), "%ld", result);
	else if (strerrorname_np(number))
		snprintf(text, sizeof(texts[0]), "%s", strerrorname_np(number));
	else
		snprintf(text, sizeof(texts[0]), "errno %d", number);
	return text;
}

HELPER const char *state_name(uint32_t state)
{
	static const char *const names[] = {
		"ERROR", "STOP", "RUNNING", "STOP_COPY",
		"RESUMING", "RUNNING_P2P", "PRE_COPY", "PRE_COPY_P2P",
	};
	static char text[16];

	if (state < 8)
		return names[state];
	snprintf(text, sizeof(text), "%u", state);
	return text;
}

HELPER const char *fd_text(int fd)
{
	int flags;

	if (fd == -1)
		return "fd none";
	if (fd == UNTOUCHED)
		return "fd untouched";
	flags = fcntl(fd, F_GETFD);
	if (flags < 0)
		return "fd not open";
	return flags & FD_CLOEXEC ? "fd new cloexec" : "fd new";
}

HELPER const char *yes_no(bool is)
{
	return is ? "yes" : "no";
}

HELPER void need(bool is, const char *what)
{
	if (is)
		return;
	say("cannot go on: %s (%s)", what, strerror(errno));
	exit(1);
}

/* ---- Memory that faults. ---- */

HELPER long page_size;
HELPER void *nowhere = (void *)8;
/* Lengths of a vector, unknown to the compiler. */
HELPER volatile int too_many = 1025, below_zero = -1;

/* Copy `size` bytes so that all behind the first `inside` lie in memory that is not there. */
HELPER void *at_edge(const void *data, size_t size, size_t inside)
{
	char *pages = mmap(NULL, 2 * page_size, PROT_READ | PROT_WRITE,
			   MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	char *start = pages + page_size - inside;

	need(pages != MAP_FAILED, "mmap");
	memcpy(start, data, size < inside ? size : inside);
	munmap(pages + page_size, page_size);
	return start;
}

HELPER void *read_only(const void *data, size_t size)
{
	void *page = mmap(NULL, page_size, PROT_READ | PROT_WRITE,
			  MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	need(page != MAP_FAILED, "mmap");
	memcpy(page, data, size);
	mprotect(page, page_size, PROT_READ);
	return page;
}

/* ---- Devices. ---- */

/* The device of a group, which it keeps, and its container, until it is closed. */
HELPER int open_by_group(int number)
{
	int container = open("/dev/vfio/vfio", O_RDWR | O_CLOEXEC), group, dev;
	char text[64];

	snprintf(text, sizeof(text), "/dev/vfio/%d", number);
	group = open(text, O_RDWR | O_CLOEXEC);
	need(container >= 0 && group >= 0, text);
	need(!ioctl(group, GROUP_SET_CONTAINER, &container), "SET_CONTAINER");
	need(!ioctl(container, SET_IOMMU, 3), "SET_IOMMU");
	snprintf(text, sizeof(text), "0000:%02x:00.0", number + 1);
	dev = ioctl(group, GROUP_GET_DEVICE_FD, text);
	need(dev >= 0, text);
	close(container);
	close(group);
	return dev;
}

/* Open a device, or get it out of its group if the environment says so. */
HELPER int open_device(int number)
{
	char path[64];
	int fd;

	if (getenv("BY_GROUP"))
		return open_by_group(number);
	snprintf(path, sizeof(path), "/dev/vfio/devices/vfio%d", number);
	fd = open(path, O_RDWR | O_CLOEXEC);
	need(fd >= 0, path);
	return fd;
}

HELPER int open_iommu(void)
{
	int fd = open("/dev/iommu", O_RDWR | O_CLOEXEC);

	need(fd >= 0, "/dev/iommu");
	return fd;
}

HELPER long bind_to(int dev, int iommufd)
{
	struct bind argument = { .argsz = 16, .iommufd = iommufd };

	return ioctl(dev, DEVICE_BIND_IOMMUFD, &argument);
}

/* Open a device and bind it to an iommufd of its own, which closes with the device. */
HELPER int open_bound(int number)
{
	int dev = open_device(number), iommufd = open_iommu();

	if (getenv("BY_GROUP")) {	/* it needs no binding, and knows none */
		close(iommufd);
		return dev;
	}

	need(bind_to(dev, iommufd) == 0, "BIND_IOMMUFD");
	close(iommufd);
	return dev;
}

HELPER long feature(int dev, uint32_t flags, uint32_t argsz)
{
	struct feature argument = { .argsz = argsz, .flags = flags };

	return ioctl(dev, DEVICE_FEATURE, &argument);
}

HELPER uint64_t region_offset(int dev, uint32_t index)
{
	struct { uint32_t argsz, flags, index, cap_offset; uint64_t size, offset; } info = {
		.argsz = sizeof(info), .index = index,
	};

	need(ioctl(dev, DEVICE_GET_REGION_INFO, &info) == 0, "GET_REGION_INFO");
	return info.offset;
}

HELPER uint64_t bar0_offset(int dev)
{
	return region_offset(dev, 0);
}

/* Let a device do DMA: without the bus master bit of its command register it cannot. */
HELPER void enable_dma(int dev)
{
	uint64_t at = region_offset(dev, 7) + 4;
	uint16_t command;

	need(pread(dev, &command, 2, at) == 2, "the command register");
	command |= 4;
	need(pwrite(dev, &command, 2, at) == 2, "the command register");
}

/* ---- What tests/devices/commanded.py does when told so through BAR0. ---- */

HELPER void command(int dev, unsigned int offset, const void *data, size_t size)
{
	need(pwrite(dev, data, size, bar0_offset(dev) + offset) == (ssize_t)size, "a command");
}

HELPER void command16(int dev, unsigned int offset, uint16_t value)
{
	command(dev, offset, &value, 2);
}

enum failure { STAYS, FATAL, BUG };

HELPER void fail_arc(int dev, int from, int to, int number, enum failure kind)
{
	uint8_t bytes[8] = { from, to, number & 0xFF, number >> 8, kind };

	command(dev, 0, bytes, sizeof(bytes));
}

HELPER void clear_commands(int dev)
{
	uint8_t zero[0x18] = { 0 };

	command(dev, 0, zero, sizeof(zero));
}

/* ---- Streams. ---- */

struct bytes { size_t size; unsigned char *data; };

/* Read to the end of the stream with reads of `chunk`; errno tells which end, 0 the permanent. */
HELPER void read_all(int fd, struct bytes *into, size_t chunk)
{
	for (;;) {
		ssize_t count;

		into->data = realloc(into->data, into->size + chunk);
		need(into->data != NULL, "realloc");
		count = read(fd, into->data + into->size, chunk);
		if (count <= 0) {
			errno = count < 0 ? errno : 0;
			return;
		}
		into->size += count;
	}
}

HELPER long write_all(int fd, const struct bytes *from, size_t chunk)
{
	size_t done = 0;

	while (done < from->size) {
		size_t size = from->size - done < chunk ? from->size - done : chunk;
		ssize_t count = write(fd, from->data + done, size);

		if (count < 0)
			return -1;
		done += count;
	}
	return 0;
}

HELPER const char *same(const struct bytes *one, const struct bytes *other)
{
	if (one->size != other->size)
		return "different sizes";
	return memcmp(one->data, other->data, one->size) ? "different bytes" : "the same bytes";
}

/* ---- Running out of descriptors. ---- */

HELPER struct rlimit usual_limit;

HELPER void exhaust_descriptors(void)
{
	struct rlimit none = { 0, 0 };

	getrlimit(RLIMIT_NOFILE, &usual_limit);
	none.rlim_max = usual_limit.rlim_max;
	setrlimit(RLIMIT_NOFILE, &none);
}

HELPER void restore_descriptors(void)
{
	setrlimit(RLIMIT_NOFILE, &usual_limit);
}

/* ---- Sections. ---- */

struct section { const char *name; void (*run)(void); };

HELPER int run_sections(const struct section *sections, int argc, char **argv)
{
	page_size = sysconf(_SC_PAGESIZE);
	alarm(50);	/* a request that hangs shall not hang the test */
	for (; sections->name; sections++) {
		bool wanted = true;

		for (int at = 1; at < argc; at++)
			wanted = wanted && strcmp(argv[at], sections->name);
		if (!wanted)
			continue;
		say("## %s", sections->name);
		sections->run();
	}
	say("## end");
	return 0;
}
