/*
 * Changes of state in the landed dialect, for the programs that speak it.
 */
#include "states.h"

static int open_for_use(int number)
{
	return open_bound(number);
}

static struct reply request(int dev, uint32_t target, bool in_read_only_memory)
{
	struct mig_state argument = { 16, SET | MIG_DEVICE_STATE, target, UNTOUCHED };
	void *where = in_read_only_memory ? read_only(&argument, 16) : &argument;
	long result = ioctl(dev, DEVICE_FEATURE, where);

	return (struct reply){ result, argument.device_state, argument.data_fd };
}

static void say_state(int dev)
{
	struct mig_state argument = {
		.argsz = 16, .flags = GET | MIG_DEVICE_STATE, .device_state = 99, .data_fd = UNTOUCHED,
	};
	long result = ioctl(dev, DEVICE_FEATURE, &argument);

	say("GET = %s, device_state %s, %s", outcome(result), state_name(argument.device_state),
	    fd_text(argument.data_fd));
}

static uint32_t state_of(int dev)
{
	struct mig_state argument = { .argsz = 16, .flags = GET | MIG_DEVICE_STATE };

	need(!ioctl(dev, DEVICE_FEATURE, &argument), "GET");
	return argument.device_state;
}

/* The state of a commanded device after power-on. */
HELPER void expect_state(struct bytes *bytes)
{
	bytes->size = 8192;
	bytes->data = malloc(bytes->size);
	for (size_t n = 0; n < bytes->size; n++)
		bytes->data[n] = n + n / 251;
}
