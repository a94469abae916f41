/* Ask a device for its migration state COUNT times and tell how long it took.
 *
 * usage: get_loop OUT COUNT          under a door that serves vfio0
 *        get_loop OUT COUNT FD       whatever answers requests on FD
 *        get_loop OUT COUNT bar N    under a door: reads 4 bytes of BAR N instead
 * OUT gets the median and the 99th percentile of one call in nanoseconds
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define VFIO_DEVICE_FEATURE _IO(';', 100 + 17)
#define VFIO_DEVICE_BIND_IOMMUFD _IO(';', 100 + 18)
#define VFIO_DEVICE_GET_REGION_INFO _IO(';', 100 + 8)
#define VFIO_DEVICE_FEATURE_GET (1 << 16)
#define VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE 2

struct feature {
	uint32_t argsz, flags;
	uint32_t device_state;
	int32_t data_fd;
};

static int64_t now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000000000LL + t.tv_nsec;
}

static int ascending(const void *a, const void *b)
{
	int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;

	return (x > y) - (x < y);
}

static int open_device(void)
{
	struct { uint32_t argsz, flags; int32_t iommufd; uint32_t out; } bind = { .argsz = 16 };
	int fd = open("/dev/vfio/devices/vfio0", O_RDWR);

	bind.iommufd = open("/dev/iommu", O_RDWR);
	if (ioctl(fd, VFIO_DEVICE_BIND_IOMMUFD, &bind)) {
		perror("vfio0");
		exit(1);
	}
	return fd;
}

static int64_t get_state(int fd)
{
	struct feature feature = {
		.argsz = sizeof(feature),
		.flags = VFIO_DEVICE_FEATURE_GET | VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE,
	};
	int64_t start = now();

	if (ioctl(fd, VFIO_DEVICE_FEATURE, &feature)) {
		perror("VFIO_DEVICE_FEATURE");
		exit(1);
	}
	start = now() - start;
	if (!feature.device_state) {
		fprintf(stderr, "no state was written\n");
		exit(1);
	}
	return start;
}

static uint64_t bar;

static void find_bar(int fd, uint32_t index)
{
	struct { uint32_t argsz, flags, index, cap; uint64_t size, offset; } info = {
		.argsz = sizeof(info), .index = index,
	};

	if (ioctl(fd, VFIO_DEVICE_GET_REGION_INFO, &info)) {
		perror("VFIO_DEVICE_GET_REGION_INFO");
		exit(1);
	}
	bar = info.offset;
}

static int64_t read_bar(int fd)
{
	uint32_t value;
	int64_t start = now();

	if (pread(fd, &value, sizeof(value), bar) != sizeof(value)) {
		perror("pread");
		exit(1);
	}
	return now() - start;
}

int main(int argc, char **argv)
{
	if (argc < 3)
		return 2;
	FILE *out = fopen(argv[1], "w");
	int of_bar = argc > 4 && !strcmp(argv[3], "bar");
	int fd = argc > 3 && !of_bar ? atoi(argv[3]) : open_device();
	long count = atol(argv[2]);

	if (!out || count < 1)
		return 2;
	int64_t *taken = calloc(count, sizeof(*taken));

	if (of_bar)
		find_bar(fd, atoi(argv[4]));
	for (long i = 0; i < count; i++)
		taken[i] = of_bar ? read_bar(fd) : get_state(fd);
	qsort(taken, count, sizeof(*taken), ascending);
	fprintf(out, "%lld %lld\n", (long long)taken[count / 2], (long long)taken[count * 99 / 100]);
	return fclose(out) ? 1 : 0;
}
