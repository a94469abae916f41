/* Move a device's state, or the same bytes in a memfd, and tell how fast it went.
 *
 * usage: stream OUT CHUNK device            under a door that serves vfio0 and vfio1
 *        stream OUT CHUNK memfd BYTES       anywhere
 *        stream OUT CHUNK arc               under a door that serves vfio0
 * OUT gets one line of numbers: seconds reading, seconds writing, bytes; for arc: the median
 * nanoseconds of STOP -> STOP_COPY.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#define VFIO_DEVICE_FEATURE 0x3B75
#define VFIO_DEVICE_BIND_IOMMUFD 0x3B76
#define SET_DEVICE_STATE (0x20000 | 2)
enum { STOP = 1, RUNNING, STOP_COPY, RESUMING };
#define ROUNDS 101

static double now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec + t.tv_nsec * 1e-9;
}

static void die(const char *what)
{
	perror(what);
	exit(1);
}

static int set_state(int dev, uint32_t state)
{
	uint32_t arg[4] = { 16, SET_DEVICE_STATE, state, -1U };

	if (ioctl(dev, VFIO_DEVICE_FEATURE, arg))
		die("set state");
	return (int)arg[3];
}

static int open_device(const char *path)
{
	struct { uint32_t argsz, flags; int32_t iommufd; uint32_t out; } bind = { .argsz = 16 };
	int dev = open(path, O_RDWR);

	bind.iommufd = open("/dev/iommu", O_RDWR);
	if (dev < 0 || ioctl(dev, VFIO_DEVICE_BIND_IOMMUFD, &bind))
		die(path);
	return dev;
}

/* Read to the end of file in chunks, into one buffer; the time of the reads alone. */
static double read_all(int fd, size_t chunk, char *buffer, size_t *total)
{
	double taken = 0;

	for (*total = 0;;) {
		double start = now();
		ssize_t got = read(fd, buffer, chunk);

		taken += now() - start;
		if (got < 0)
			die("read");
		if (got == 0)
			return taken;
		*total += got;
	}
}

static double write_all(int fd, size_t chunk, const char *bytes, size_t total)
{
	double start = now();

	for (size_t done = 0; done < total;) {
		size_t size = total - done < chunk ? total - done : chunk;
		ssize_t put = write(fd, bytes + done, size);

		if (put < 0)
			die("write");
		done += put;
	}
	return now() - start;
}

/* The whole stream, for writing it elsewhere. */
static char *keep_all(int fd, size_t *total)
{
	size_t room = (size_t)1 << 33;
	char *bytes = mmap(0, room, PROT_READ | PROT_WRITE,
			   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

	madvise(bytes, room, MADV_HUGEPAGE);
	*total = 0;
	for (ssize_t got; (got = read(fd, bytes + *total, 1 << 22)); *total += got)
		if (got < 0)
			die("read");
	return bytes;
}

static void through_devices(FILE *out, size_t chunk)
{
	int source = open_device("/dev/vfio/devices/vfio0");
	int target = open_device("/dev/vfio/devices/vfio1");
	char *buffer = malloc(chunk);
	size_t total;

	memset(buffer, 1, chunk);
	double reading = read_all(set_state(source, STOP_COPY), chunk, buffer, &total);

	set_state(source, STOP);
	char *bytes = keep_all(set_state(source, STOP_COPY), &total);
	double writing = write_all(set_state(target, RESUMING), chunk, bytes, total);

	set_state(target, RUNNING);
	fprintf(out, "%.6f %.6f %zu\n", reading, writing, total);
}

static void through_memfd(FILE *out, size_t chunk, size_t total)
{
	int fd = memfd_create("bytes", 0);
	char *bytes = mmap(0, total, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	char *buffer = malloc(chunk);

	madvise(bytes, total, MADV_HUGEPAGE);
	memset(bytes, 0x5A, total);
	memset(buffer, 1, chunk);
	write_all(fd, chunk, bytes, total); /* its pages exist from here on, as a device's do */
	lseek(fd, 0, SEEK_SET);
	double writing = write_all(fd, chunk, bytes, total);

	lseek(fd, 0, SEEK_SET);
	double reading = read_all(fd, chunk, buffer, &total);

	fprintf(out, "%.6f %.6f %zu\n", reading, writing, total);
}

static int ascending(const void *a, const void *b)
{
	double x = *(const double *)a, y = *(const double *)b;

	return (x > y) - (x < y);
}

static void one_arc(FILE *out)
{
	int dev = open_device("/dev/vfio/devices/vfio0");
	double taken[ROUNDS];
	char byte;

	for (int i = 0; i < ROUNDS; i++) {
		set_state(dev, STOP);
		double start = now();
		int fd = set_state(dev, STOP_COPY);

		taken[i] = now() - start;
		if (read(fd, &byte, 1) != 1)
			die("read");
		close(fd);
	}
	qsort(taken, ROUNDS, sizeof(*taken), ascending);
	fprintf(out, "%.0f\n", taken[ROUNDS / 2] * 1e9);
}

int main(int argc, char **argv)
{
	if (argc < 4)
		return 2;
	FILE *out = fopen(argv[1], "w");
	size_t chunk = strtoul(argv[2], 0, 0);

	if (!out || !chunk)
		return 2;
	if (!strcmp(argv[3], "device"))
		through_devices(out, chunk);
	else if (!strcmp(argv[3], "arc"))
		one_arc(out);
	else if (argc == 5)
		through_memfd(out, chunk, strtoul(argv[4], 0, 0));
	else
		return 2;
	return fclose(out) ? 1 : 0;
}
