/*
 * Data transfer sessions in the landed dialect: what a data_fd is, what moves through it, and when
 * it ends.
 */
#include "landed.h"

#include <semaphore.h>

static const unsigned char zeros[8192];

/* ---- What a data_fd is. ---- */

static void describe(int fd)
{
	char byte = 0;
	struct iovec part = { &byte, 1 };
	int ends[2], file = open("/tmp", O_TMPFILE | O_RDWR, 0600), access;
	off_t offset = 0;

	need(!pipe(ends) && file >= 0, "a pipe and a file");
	need(write(ends[1], "x", 1) == 1 && write(file, "x", 1) == 1, "write");
	access = fcntl(fd, F_GETFL) & O_ACCMODE;
	say("access mode = %s", access == O_RDONLY ? "O_RDONLY" : access == O_WRONLY ? "O_WRONLY" : "?");
	say("read of 0 = %s", outcome(read(fd, &byte, 0)));
	say("write of 0 = %s", outcome(write(fd, &byte, 0)));
	say("the wrong direction = %s",
	    outcome(access == O_RDONLY ? write(fd, &byte, 1) : read(fd, &byte, 1)));
	say("the wrong direction, vector = %s",
	    outcome(access == O_RDONLY ? writev(fd, &part, 1) : readv(fd, &part, 1)));
	say("lseek = %s", outcome(lseek(fd, 0, SEEK_CUR)));
	say("pread = %s", outcome(pread(fd, &byte, 1, 0)));
	say("pwrite = %s", outcome(pwrite(fd, &byte, 1, 0)));
	say("pread at a negative offset = %s", outcome(pread(fd, &byte, 1, -2)));
	say("pwrite at a negative offset = %s", outcome(pwrite(fd, &byte, 1, -2)));
	say("preadv = %s", outcome(preadv(fd, &part, 1, 0)));
	say("pwritev = %s", outcome(pwritev(fd, &part, 1, 0)));
	say("splice from = %s", outcome(splice(fd, NULL, ends[1], NULL, 1, 0)));
	say("splice to = %s", outcome(splice(ends[0], NULL, fd, NULL, 1, 0)));
	say("tee from = %s", outcome(tee(fd, ends[1], 1, 0)));
	say("tee to = %s", outcome(tee(ends[0], fd, 1, 0)));
	say("vmsplice = %s", outcome(vmsplice(fd, &part, 1, 0)));
	say("sendfile from = %s", outcome(sendfile(file, fd, NULL, 1)));
	say("sendfile from an offset = %s", outcome(sendfile(file, fd, &offset, 1)));
	lseek(file, 0, SEEK_SET);
	say("sendfile to = %s", outcome(sendfile(fd, file, NULL, 1)));
	say("copy_file_range from = %s", outcome(copy_file_range(fd, NULL, file, NULL, 1, 0)));
	say("copy_file_range to = %s", outcome(copy_file_range(file, NULL, fd, NULL, 1, 0)));
	say("mmap = %s",
	    outcome(mmap(NULL, 4096, PROT_READ, MAP_SHARED, fd, 0) == MAP_FAILED ? -1 : 0));
	say("fsync = %s", outcome(fsync(fd)));
	say("fdatasync = %s", outcome(fdatasync(fd)));
	say("ftruncate = %s", outcome(ftruncate(fd, 0)));
	say("fallocate = %s", outcome(fallocate(fd, 0, 0, 1)));
	say("sync_file_range = %s", outcome(sync_file_range(fd, 0, 1, 0)));
	close(ends[0]);
	close(ends[1]);
	close(file);
}

static void section_saving_descriptor(void)
{
	int dev = open_bound(COMMANDED), fd = go(dev, STOP_COPY);
	struct bytes seen = { 0 }, expected;

	describe(fd);
	expect_state(&expected);
	read_all(fd, &seen, 1000);
	say("none of this took a byte: %s", same(&seen, &expected));
	close(fd);
	close(dev);
}

static void section_resuming_descriptor(void)
{
	int dev = open_bound(COMMANDED), fd = go(dev, RESUMING);
	struct bytes state;

	describe(fd);
	expect_state(&state);
	say("none of this gave a byte: the state = %s", outcome(write_all(fd, &state, 3000)));
	say_set(dev, STOP);
	close(fd);
	close(dev);
}

/* ---- Reading. ---- */

static void section_reading(void)
{
	static const size_t chunks[] = { 1, 7, 4096, 5000, 8192, 100000 };
	int dev = open_bound(COMMANDED), fd;
	struct bytes expected;
	char byte;

	expect_state(&expected);
	for (int at = 0; at < 6; at++) {
		struct bytes seen = { 0 };

		go(dev, STOP);
		fd = go(dev, STOP_COPY);
		read_all(fd, &seen, chunks[at]);
		say("reads of %zu: %s, then %s", chunks[at], same(&seen, &expected),
		    errno ? strerrorname_np(errno) : "the end");
		say("once more = %s", outcome(read(fd, &byte, 1)));
		close(fd);
		free(seen.data);
	}
	close(dev);
}

static void section_reading_into(void)
{
	int dev = open_bound(COMMANDED), fd = go(dev, STOP_COPY);
	struct bytes seen = { 0, malloc(16384) }, expected;
	struct iovec parts[3] = { { seen.data, 100 }, { NULL, 0 }, { seen.data + 100, 900 } };
	struct iovec bad[2] = { { nowhere, 10 }, { seen.data, 10 } };
	struct iovec huge = { seen.data, SIZE_MAX };
	char *half;
	ssize_t count;

	expect_state(&expected);
	say("into nowhere = %s", outcome(read(fd, nowhere, 100)));
	say("into read-only memory = %s", outcome(read(fd, read_only("", 1), 100)));
	say("a vector that begins nowhere = %s", outcome(readv(fd, bad, 2)));
	say("a vector that is nowhere = %s", outcome(readv(fd, nowhere, 2)));
	say("a vector of 1025 = %s", outcome(readv(fd, parts, too_many)));
	say("a vector of -1 = %s", outcome(readv(fd, parts, below_zero)));
	say("a vector with a negative length = %s", outcome(readv(fd, &huge, 1)));
	say("a vector of none = %s", outcome(readv(fd, parts, 0)));
	say("0 bytes into nowhere = %s", outcome(read(fd, nowhere, 0)));
	count = readv(fd, parts, 3);
	say("a vector of 100, 0 and 900 = %s", outcome(count));
	seen.size = count;
	half = at_edge("", 1, 500);
	count = read(fd, half, 1000);
	say("memory that ends after 500 = %s", outcome(count));
	memcpy(seen.data + seen.size, half, 500);
	seen.size += count;
	count = preadv2(fd, parts, 0, -1, 0);
	say("preadv2 at -1 of none = %s", outcome(count));
	parts[0].iov_base = seen.data + seen.size;
	count = preadv2(fd, parts, 1, -1, 0);
	say("preadv2 at -1 = %s", outcome(count));
	seen.size += count;
	read_all(fd, &seen, 3000);
	say("altogether: %s", same(&seen, &expected));
	close(fd);
	close(dev);
}

static void section_reading_fails(void)
{
	int dev = open_bound(COMMANDED), fd;
	struct bytes seen = { 0 };
	char byte;

	command16(dev, 0x08, EILSEQ);
	fd = go(dev, STOP_COPY);
	read_all(fd, &seen, 3000);
	say("%zu bytes, then %s", seen.size, strerrorname_np(errno));
	say("then = %s", outcome(read(fd, &byte, 1)));
	say_state(dev);
	close(fd);
	clear_commands(dev);
	say_set(dev, STOP);
	fd = say_set(dev, STOP_COPY);
	say("read = %s", outcome(read(fd, &byte, 1)));
	close(fd);
	close(dev);
}

/* ---- Writing. ---- */

static void section_writing(void)
{
	static const size_t chunks[] = { 1, 7, 4096, 5000, 8192 };
	int dev = open_bound(COMMANDED), fd;
	struct bytes state;

	expect_state(&state);
	for (size_t at = 0; at < sizeof(chunks) / sizeof(chunks[0]); at++) {
		struct bytes seen = { 0 };

		state.data[at] ^= 0xFF;	/* so that what comes back is what was written */
		fd = go(dev, RESUMING);
		say("writes of %zu = %s", chunks[at], outcome(write_all(fd, &state, chunks[at])));
		say("one byte more = %s", outcome(write(fd, "", 1)));
		say("nothing more = %s", outcome(write(fd, "", 0)));
		say_set(dev, STOP);
		say("after the session = %s", outcome(write(fd, "", 1)));
		close(fd);
		fd = go(dev, STOP_COPY);
		read_all(fd, &seen, 8192);
		say("saved again: %s", same(&seen, &state));
		free(seen.data);
		close(fd);
		go(dev, STOP);
	}
	close(dev);
}

static void section_writing_from(void)
{
	int dev = open_bound(COMMANDED), fd = go(dev, RESUMING);
	struct bytes state, rest;
	struct iovec parts[3] = { { 0 } }, bad[2] = { { nowhere, 10 }, { nowhere, 10 } };
	ssize_t count;

	expect_state(&state);
	parts[0] = (struct iovec){ state.data, 100 };
	parts[2] = (struct iovec){ state.data + 100, 900 };
	say("from nowhere = %s", outcome(write(fd, nowhere, 100)));
	say("a vector from nowhere = %s", outcome(writev(fd, bad, 2)));
	say("a vector that is nowhere = %s", outcome(writev(fd, nowhere, 2)));
	say("a vector of 1025 = %s", outcome(writev(fd, parts, too_many)));
	say("0 bytes from nowhere = %s", outcome(write(fd, nowhere, 0)));
	say("a vector of 100, 0 and 900 = %s", outcome(writev(fd, parts, 3)));
	say("read-only memory = %s", outcome(write(fd, read_only(state.data + 1000, 500), 500)));
	count = write(fd, at_edge(state.data + 1500, 500, 500), 1000);
	say("memory that ends after 500 = %s", outcome(count));
	rest = (struct bytes){ state.size - 2000, state.data + 2000 };
	say("the rest = %s", outcome(write_all(fd, &rest, 1000)));
	say_set(dev, STOP);
	close(fd);
	close(dev);
}

static void say_broken_load(int dev, int fd, const char *what)
{
	say("%s:", what);
	say_set(dev, STOP);
	say_state(dev);
	say("write = %s", outcome(write(fd, zeros, 1)));
	say_set(dev, RUNNING);
	say_reset(dev);
	say_state(dev);
	close(fd);
}

static void section_verdict(void)
{
	int dev = open_bound(COMMANDED), fd = go(dev, RESUMING);

	say_broken_load(dev, fd, "nothing was written");
	fd = go(dev, RESUMING);
	say("write = %s", outcome(write(fd, zeros, 5000)));
	say_broken_load(dev, fd, "the state is too short");
	command16(dev, 0x0A, EPROTO);
	fd = go(dev, RESUMING);
	say("write = %s", outcome(write(fd, zeros, 5000)));
	say("write = %s", outcome(write(fd, zeros, 3192)));
	say_broken_load(dev, fd, "refused in the middle");
	command16(dev, 0x0C, EBADMSG);
	fd = go(dev, RESUMING);
	say("write = %s", outcome(write(fd, zeros, 5000)));
	say("write = %s", outcome(write(fd, zeros, 3192)));
	say_broken_load(dev, fd, "refused at the end");
	fd = go(dev, RESUMING);
	say("write of all = %s", outcome(write(fd, zeros, 8192)));
	close(fd);
	say("closed before the verdict:");
	say_set(dev, STOP);
	close(dev);
	dev = open_bound(DESTINATION);
	fd = go(dev, RESUMING);
	say("foreign bytes = %s", outcome(write(fd, zeros, 8192)));
	say_broken_load(dev, fd, "a foreign state");
	close(dev);
}

/* ---- Copies: one stream, one position. ---- */

static void receive_and_read(int end)
{
	char byte, control[CMSG_SPACE(sizeof(int))];
	struct iovec part = { &byte, 1 };
	struct msghdr message = {
		.msg_iov = &part, .msg_iovlen = 1,
		.msg_control = control, .msg_controllen = sizeof(control),
	};
	unsigned char bytes[100];
	int fd;

	need(recvmsg(end, &message, MSG_CMSG_CLOEXEC) == 1, "recvmsg");
	memcpy(&fd, CMSG_DATA(CMSG_FIRSTHDR(&message)), sizeof(fd));
	say("read of one that was handed over = %s", outcome(read(fd, bytes, 100)));
	say("its first byte: %u", bytes[0]);
	fflush(stdout);
	_exit(0);
}

static void hand_over(int fd, int end)
{
	char control[CMSG_SPACE(sizeof(int))] = { 0 };
	struct iovec part = { "x", 1 };
	struct msghdr message = {
		.msg_iov = &part, .msg_iovlen = 1,
		.msg_control = control, .msg_controllen = sizeof(control),
	};
	struct cmsghdr *header = CMSG_FIRSTHDR(&message);

	header->cmsg_level = SOL_SOCKET;
	header->cmsg_type = SCM_RIGHTS;
	header->cmsg_len = CMSG_LEN(sizeof(fd));
	memcpy(CMSG_DATA(header), &fd, sizeof(fd));
	need(sendmsg(end, &message, 0) == 1, "sendmsg");
}

static void section_copies(void)
{
	int dev = open_bound(COMMANDED), ends[2], copy, fd;
	unsigned char bytes[100];
	pid_t child;

	need(!socketpair(AF_UNIX, SOCK_STREAM, 0, ends), "socketpair");
	child = fork();
	if (child == 0)
		receive_and_read(ends[1]);
	fd = go(dev, STOP_COPY);
	hand_over(fd, ends[0]);
	waitpid(child, NULL, 0);
	copy = dup(fd);
	say("read of a copy = %s", outcome(read(copy, bytes, 100)));
	say("its first byte: %u", bytes[0]);
	close(fd);
	need(dup2(copy, fd) == fd, "dup2");
	close(copy);
	say("read of a copy by dup2 = %s", outcome(read(fd, bytes, 100)));
	say("its first byte: %u", bytes[0]);
	child = fork();
	if (child == 0) {
		say("read by a child = %s", outcome(read(fd, bytes, 100)));
		say("its first byte: %u", bytes[0]);
		_exit(0);
	}
	waitpid(child, NULL, 0);
	say("read by the parent = %s", outcome(read(fd, bytes, 100)));
	say("its first byte: %u", bytes[0]);
	need(dup2(1, fd) == fd, "dup2");
	say("the number, after something else took it = %s", outcome(ioctl(fd, MIG_GET_PRECOPY_INFO, 0)));
	close(fd);
	say_state(dev);
	close(ends[0]);
	close(ends[1]);
	close(dev);
}

/* ---- Readiness. ---- */

static void say_poll(int fd, const char *when)
{
	struct pollfd one = { fd, POLLIN | POLLOUT, 0 };
	struct epoll_event event = { .events = EPOLLIN | EPOLLOUT };
	int epoll = epoll_create1(0), result = poll(&one, 1, 0);
	long added = epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event);
	const char *add = outcome(added);

	say("%s: poll = %d%s%s%s%s, epoll %s = %d", when, result,
	    one.revents & POLLIN ? " IN" : "", one.revents & POLLOUT ? " OUT" : "",
	    one.revents & POLLERR ? " ERR" : "", one.revents & POLLHUP ? " HUP" : "", add,
	    added ? 0 : epoll_wait(epoll, &event, 1, 0));
	close(epoll);
}

static void section_poll(void)
{
	int dev = open_bound(COMMANDED), fd = go(dev, PRE_COPY);
	struct bytes seen = { 0 };

	say_poll(fd, "PRE_COPY, data");
	read_all(fd, &seen, 1000);
	say_poll(fd, "PRE_COPY, the temporary end");
	go(dev, STOP_COPY);
	say_poll(fd, "STOP_COPY, data");
	read_all(fd, &seen, 1000);
	say_poll(fd, "STOP_COPY, the end");
	go(dev, STOP);
	say_poll(fd, "after the saving session");
	close(fd);
	fd = go(dev, RESUMING);
	say_poll(fd, "RESUMING");
	ioctl(dev, DEVICE_RESET);
	say_poll(fd, "after the resuming session");
	close(fd);
	close(dev);
}

/* ---- Somebody is blocked when the session ends. ---- */

static double seconds(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec + now.tv_nsec / 1e9;
}

static double woken;
static sem_t first_read;

static void *read_slowly(void *number)
{
	int fd = *(int *)number;
	static char buffer[8192];
	ssize_t count = read(fd, buffer, 4096);

	say("read = %s", outcome(count));
	sem_post(&first_read);
	count = read(fd, buffer, 4096);
	woken = seconds();
	say("the read that waited = %s", outcome(count));
	return NULL;
}

static void section_blocked(void)
{
	static const int ways[] = { STOP, RUNNING, -1 };

	for (int at = 0; at < 3; at++) {
		int dev = open_bound(COMMANDED), fd;
		uint8_t one = 1;
		pthread_t reader;
		double ended;

		command(dev, 0x10, &one, 1);
		fd = go(dev, STOP_COPY);
		sem_init(&first_read, 0, 0);
		pthread_create(&reader, NULL, read_slowly, &fd);
		sem_wait(&first_read);
		usleep(100000); /* for the reader to be in the read that waits */
		say("%s ends the session:", ways[at] < 0 ? "RESET" : state_name(ways[at]));
		ended = seconds();
		if (ways[at] < 0)
			ioctl(dev, DEVICE_RESET);
		else
			go(dev, ways[at]);
		pthread_join(reader, NULL);
		say("woken at once: %s", yes_no(woken - ended < 10));
		clear_commands(dev);
		close(fd);
		close(dev);
	}
}

static const struct section sections[] = {
	{ "a saving data_fd", section_saving_descriptor },
	{ "a resuming data_fd", section_resuming_descriptor },
	{ "reading", section_reading },
	{ "reading: where to", section_reading_into },
	{ "reading: saving fails", section_reading_fails },
	{ "writing", section_writing },
	{ "writing: where from", section_writing_from },
	{ "writing: the verdict", section_verdict },
	{ "copies", section_copies },
	{ "poll", section_poll },
	{ "blocked", section_blocked },
	{ NULL, NULL },
};

int main(int argc, char **argv)
{
	return run_sections(sections, argc, argv);
}
