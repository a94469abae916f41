/*
 * Every request for a state from every state. Arguments: the dialect, then the numbers of the
 * states to begin in, 0 for ERROR. The device is vfio0, commanded. One line for each pair:
 *
 *   origin target result final-state descriptor old-session arcs
 *
 * result is 0 or an errno's name; descriptor is "new" or "none"; old-session is "lives", "dead"
 * or "none"; arcs are pairs of states, joined by commas, as the device saw them.
 */
#include "check.h"

static bool is_v6;

static long set_state(int dev, uint32_t target, int *fd)
{
	struct mig_state landed = { 16, SET | MIG_DEVICE_STATE, target, UNTOUCHED };
	struct v6_state v6 = { 16, target, UNTOUCHED, 0 };
	long result = is_v6 ? ioctl(dev, DEVICE_MIG_SET_STATE, &v6) :
			      ioctl(dev, DEVICE_FEATURE, &landed);

	*fd = is_v6 ? v6.data_fd : landed.data_fd;
	return result;
}

static uint32_t state_of(int dev)
{
	struct mig_state landed = { 16, GET | MIG_DEVICE_STATE, 0, UNTOUCHED };
	struct v6_state v6 = { 16, ERROR, UNTOUCHED, 0 };

	if (is_v6) {
		ioctl(dev, DEVICE_MIG_SET_STATE, &v6);	/* refused, and tells the state */
		return v6.device_state;
	}
	need(!ioctl(dev, DEVICE_FEATURE, &landed), "GET");
	return landed.device_state;
}

/* Bring a device from RUNNING to `origin`; return the data_fd of its session, or -1. */
static int begin_in(int dev, uint32_t origin)
{
	static const char state[8192];
	int fd;

	if (origin == ERROR) {
		fail_arc(dev, RUNNING, 0, EIO, FATAL);
		need(set_state(dev, STOP, &fd) < 0, "a failure");
		return -1;
	}
	need(!set_state(dev, origin, &fd), state_name(origin));
	if (origin == RESUMING)	/* so that it may be left */
		need(write(fd, state, sizeof(state)) == sizeof(state), "write");
	return fd;
}

static const char *life(int fd, uint32_t origin)
{
	char byte;

	if (fd < 0)
		return "none";
	if ((origin == RESUMING ? write(fd, &byte, 0) : read(fd, &byte, 0)) == 0)
		return "lives";
	return errno == ENODEV ? "dead" : outcome(-1);
}

static void print_arcs(int dev)
{
	uint8_t arcs[16];

	need(pread(dev, arcs, sizeof(arcs), bar0_offset(dev) + 0x40) == sizeof(arcs), "pread");
	for (int at = 1; at <= arcs[0]; at++)
		printf("%s%d-%d", at == 1 ? " " : ",", arcs[at] >> 4, arcs[at] & 15);
	printf("\n");
}

static void try(int dev, uint32_t origin, uint32_t target)
{
	uint8_t none = 0;
	int old, fd;
	long result;

	need(!ioctl(dev, DEVICE_RESET), "RESET");
	old = begin_in(dev, origin);
	command(dev, 0x40, &none, 1);
	result = set_state(dev, target, &fd);
	printf("%u %u %s", origin, target, outcome(result));
	printf(" %u %s %s", state_of(dev), fd == -1 ? "none" : "new", life(old, origin));
	print_arcs(dev);
	if (fd >= 0)
		close(fd);
	if (old >= 0)
		close(old);
}

int main(int argc, char **argv)
{
	static const uint32_t targets[] = {
		0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 255, 256, 0x7FFFFFFF, 0x80000000, UINT32_MAX,
	};
	int dev;

	alarm(100);
	is_v6 = !strcmp(argv[1], "v6");
	dev = open_bound(0);
	for (int at = 2; at < argc; at++)
		for (size_t to = 0; to < sizeof(targets) / sizeof(targets[0]); to++)
			try(dev, atoi(argv[at]), targets[to]);
	close(dev);
	return 0;
}
