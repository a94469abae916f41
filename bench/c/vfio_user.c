/* Ask a vfio-user server again and again, and tell how long it took.
 *
 * usage: vfio_user OUT SOCKET region COUNT   4-byte reads of region 0
 *        vfio_user OUT SOCKET state CHUNK    the whole state read, and written back
 * OUT gets the median and the 99th percentile of one read in microseconds, or the seconds of
 * reading and writing and the bytes of the state
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

enum { VERSION = 1, REGION_READ = 9, FEATURE = 16, MIG_DATA_READ, MIG_DATA_WRITE };
enum { STOP = 1, RUNNING, STOP_COPY, RESUMING };
#define SET_DEVICE_STATE (1 << 17 | 2)
#define ROOM (2UL << 30)

struct header {
	uint16_t id, command;
	uint32_t size, flags, error;
};

struct region_access {
	struct header header;
	uint64_t offset;
	uint32_t region, count;
};

struct mig_data {
	struct header header;
	uint32_t argsz, size;
};

struct set_state {
	struct header header;
	uint32_t argsz, flags, state;
	int32_t data_fd;
};

static int server;

static double now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec + t.tv_nsec / 1e9;
}

static void die(const char *what)
{
	perror(what);
	exit(1);
}

static void send_parts(struct iovec *parts, int count)
{
	while (count) {
		ssize_t sent = writev(server, parts, count);

		if (sent <= 0)
			die("send");
		while (count && (size_t)sent >= parts->iov_len) {
			sent -= parts->iov_len;
			parts++;
			count--;
		}
		if (count) {
			parts->iov_base = (char *)parts->iov_base + sent;
			parts->iov_len -= sent;
		}
	}
}

static void send_all(const void *data, size_t size)
{
	struct iovec part = { (void *)data, size };

	send_parts(&part, 1);
}

static void receive(void *data, size_t size)
{
	while (size) {
		ssize_t got = recv(server, data, size, MSG_WAITALL);

		if (got <= 0)
			die("receive");
		data = (char *)data + got;
		size -= got;
	}
}

/* Receive a reply: the header and `head` bytes into `reply`, what follows into `data`. */
static size_t receive_reply(void *reply, size_t head, void *data)
{
	struct header *header = reply;

	receive(reply, sizeof(*header));
	if (header->error || header->size < sizeof(*header) + head) {
		fprintf(stderr, "command %d: error %u\n", header->command, header->error);
		exit(1);
	}
	receive(header + 1, head);
	size_t left = header->size - sizeof(*header) - head;

	receive(data, left);
	return left;
}

static void connect_to(const char *path)
{
	static const char text[] =
		"{\"capabilities\":{\"max_msg_fds\":8,\"max_data_xfer_size\":16777216}}";
	struct sockaddr_un address = { .sun_family = AF_UNIX };
	struct {
		struct header header;
		uint16_t major, minor;
		char text[sizeof(text)];
	} request = { .header = { .command = VERSION, .size = 20 + sizeof(text) }, .minor = 2 };
	char rest[4096];
	struct header reply;

	memcpy(request.text, text, sizeof(text));
	strncpy(address.sun_path, path, sizeof(address.sun_path) - 1);
	server = socket(AF_UNIX, SOCK_STREAM, 0);
	if (connect(server, (struct sockaddr *)&address, sizeof(address)))
		die(path);
	send_all(&request, 20 + sizeof(text));
	receive_reply(&reply, 0, rest);
}

static void set_state(uint32_t state)
{
	struct set_state request = { .header = { .command = FEATURE, .size = sizeof(request) },
				     .argsz = 16, .flags = SET_DEVICE_STATE,
				     .state = state, .data_fd = -1 };
	char rest[64];

	send_all(&request, sizeof(request));
	receive_reply(&request, 0, rest);
}

static int ascending(const void *a, const void *b)
{
	double x = *(const double *)a, y = *(const double *)b;

	return (x > y) - (x < y);
}

static void read_region(FILE *out, long count)
{
	struct region_access request = { .header = { .command = REGION_READ,
						     .size = sizeof(request) }, .count = 4 };
	struct {
		struct region_access access;
		uint32_t value;
	} reply;
	double *taken = calloc(count, sizeof(*taken));

	for (long i = 0; i < count; i++) {
		double start = now();

		request.header.id = i;
		send_all(&request, sizeof(request));
		receive(&reply, sizeof(request) + 4);
		taken[i] = now() - start;
		if (reply.access.header.id != (uint16_t)i || reply.access.count != 4)
			die("another reply");
	}
	qsort(taken, count, sizeof(*taken), ascending);
	fprintf(out, "%.3f %.3f\n", taken[count / 2] * 1e6, taken[count * 99 / 100] * 1e6);
}

static size_t read_state(char *bytes, uint32_t chunk)
{
	struct mig_data request = { .header = { .command = MIG_DATA_READ,
						.size = sizeof(request) },
				    .argsz = 8 + chunk, .size = chunk };
	struct mig_data reply;
	size_t total = 0;

	do {
		send_all(&request, sizeof(request));
		total += receive_reply(&reply, 8, bytes + total);
	} while (reply.size);
	return total;
}

static void write_state(const char *bytes, size_t total, uint32_t chunk)
{
	struct header reply;
	char rest[64];

	for (size_t at = 0; at < total; at += chunk) {
		uint32_t size = total - at < chunk ? total - at : chunk;
		struct mig_data request = { .header = { .command = MIG_DATA_WRITE,
							.size = sizeof(request) + size },
					    .argsz = 8 + size, .size = size };
		struct iovec parts[] = { { &request, sizeof(request) },
					 { (void *)(bytes + at), size } };

		send_parts(parts, 2);
		receive_reply(&reply, 0, rest);
	}
}

static void move_state(FILE *out, uint32_t chunk)
{
	char *bytes = mmap(0, ROOM, PROT_READ | PROT_WRITE,
			   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

	/* The first way there and back gives every page to both ends; the second one counts. */
	for (int counts = 0; counts < 2; counts++) {
		set_state(STOP_COPY);
		double start = now();
		size_t total = read_state(bytes, chunk);
		double reading = now() - start;

		set_state(STOP);
		set_state(RESUMING);
		start = now();
		write_state(bytes, total, chunk);
		double writing = now() - start;

		set_state(STOP);
		if (counts)
			fprintf(out, "%.6f %.6f %zu\n", reading, writing, total);
	}
}

int main(int argc, char **argv)
{
	if (argc != 5)
		return 2;
	FILE *out = fopen(argv[1], "w");

	connect_to(argv[2]);
	if (!strcmp(argv[3], "region"))
		read_region(out, atol(argv[4]));
	else
		move_state(out, strtoul(argv[4], 0, 0));
	return fclose(out) ? 1 : 0;
}
