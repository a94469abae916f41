/*
 * Migrate vfio0 into vfio1, with nothing but system calls.
 *
 *   cc -o migrate examples/migrate.c
 *   vfiomig run --device pattern,seed=1 --device pattern,seed=2 -- ./migrate
 *   vfiomig run --device pattern,seed=1 --device pattern,seed=2 --dialect v6 -- ./migrate v6
 *
 * Numbers and structures are those of docs/protocol.md; with Linux headers of 6.6 or later,
 * <linux/vfio.h> has those of the landed dialect.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

enum { ERROR, STOP, RUNNING, STOP_COPY, RESUMING };

#define VFIO_DEVICE_FEATURE 0x3b75
#define VFIO_DEVICE_BIND_IOMMUFD 0x3b76
#define VFIO_DEVICE_MIG_SET_STATE 0x3b79
#define FEATURE_MIG_DEVICE_STATE 2
#define FEATURE_GET 0x10000
#define FEATURE_SET 0x20000

struct bind { uint32_t argsz, flags; int32_t iommufd; uint32_t devid; };
struct landed { uint32_t argsz, flags, device_state; int32_t data_fd; };
struct v6 { uint32_t argsz, device_state; int32_t data_fd; uint32_t flags; };

static int speak_v6;

static int open_device(const char *path)
{
	struct bind bind = {.argsz = sizeof bind};
	int device = open(path, O_RDWR);

	if (device < 0) {
		perror(path);
		exit(1);
	}
	if (speak_v6) /* which knows no character device, and so nothing to bind */
		return device;
	bind.iommufd = open("/dev/iommu", O_RDWR);
	if (bind.iommufd < 0 || ioctl(device, VFIO_DEVICE_BIND_IOMMUFD, &bind)) {
		perror("bind");
		exit(1);
	}
	return device;
}

/* Returns the data_fd, or -1 where the state has none. */
static int set_state(int device, uint32_t target)
{
	struct landed get = {sizeof get, FEATURE_GET | FEATURE_MIG_DEVICE_STATE, 0, -1};
	struct landed set = {sizeof set, FEATURE_SET | FEATURE_MIG_DEVICE_STATE, target, -1};
	struct v6 old = {sizeof old, target, -1, 0};
	int failed = speak_v6 ? ioctl(device, VFIO_DEVICE_MIG_SET_STATE, &old)
			      : ioctl(device, VFIO_DEVICE_FEATURE, &set);

	if (!failed)
		return speak_v6 ? old.data_fd : set.data_fd;
	fprintf(stderr, "state %u: %s\n", target, strerror(errno));
	/* Where the device is now: in the structure, or asked for. */
	if (!speak_v6 && ioctl(device, VFIO_DEVICE_FEATURE, &get) == 0)
		old.device_state = get.device_state;
	fprintf(stderr, "the device is in state %u\n", old.device_state);
	exit(1);
}

static void write_all(int fd, const char *data, ssize_t size)
{
	for (ssize_t written; size > 0; data += written, size -= written) {
		written = write(fd, data, size);
		if (written < 0) {
			perror("write");
			exit(1);
		}
	}
}

int main(int argc, char **argv)
{
	static char buffer[1 << 20];
	long total = 0;
	ssize_t size;

	speak_v6 = argc > 1 && strcmp(argv[1], "v6") == 0;
	int source = open_device("/dev/vfio/devices/vfio0");
	int destination = open_device("/dev/vfio/devices/vfio1");
	int saving = set_state(source, STOP_COPY);
	int loading = set_state(destination, RESUMING);

	while ((size = read(saving, buffer, sizeof buffer)) > 0) {
		write_all(loading, buffer, size);
		total += size;
	}
	if (size < 0) {
		perror("read");
		return 1;
	}
	set_state(destination, RUNNING); /* which passes STOP: the verdict on what was written */
	set_state(source, STOP);
	printf("%ld bytes, and the destination runs\n", total);
	return 0;
}
