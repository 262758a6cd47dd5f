/* A disk of a chosen speed, for the process that this is preloaded into: preadv of kvd's segment files is paced.

   SLOW_DISK names a file of two doubles, which may change at any time: bytes a second (0: as fast as it is) and seconds
   of latency. All threads share one queue, as they share a disk: a read ends when those before it and its own bytes
   would have been transferred, and its latency after that. What the real disk needs is part of it, not added. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

static const volatile double *control;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static double idle_from; /* when the disk has transferred all that was asked of it */

__attribute__((constructor)) static void open_control(void) {
    const char *path = getenv("SLOW_DISK");
    int fd = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
    if (fd < 0)
        return;
    void *map = mmap(NULL, 2 * sizeof(double), PROT_READ, MAP_SHARED, fd, 0);
    close(fd);
    if (map != MAP_FAILED)
        control = map;
}

static double now_s(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + 1e-9 * t.tv_nsec;
}

static int is_segment(int fd) {
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, sizeof path - 1);
    if (n <= 0)
        return 0;
    path[n] = 0;
    return strstr(path, "/segment-") != NULL;
}

typedef ssize_t (*reader)(int, const struct iovec *, int, off64_t, int);

static ssize_t paced(int fd, const struct iovec *iov, int count, off64_t offset, int flags) {
    static reader real;
    if (!real)
        real = (reader)dlsym(RTLD_NEXT, "preadv64v2");
    double asked = now_s();
    ssize_t got = real(fd, iov, count, offset, flags);
    if (got <= 0 || !control || !(control[0] > 0) || !is_segment(fd))
        return got;
    pthread_mutex_lock(&lock);
    idle_from = (idle_from > asked ? idle_from : asked) + got / control[0];
    double until = idle_from + control[1];
    pthread_mutex_unlock(&lock);
    struct timespec t = {(time_t)until, (long)(1e9 * (until - (time_t)until))};
    while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &t, NULL))
        ;
    return got;
}

ssize_t preadv64v2(int fd, const struct iovec *iov, int count, off64_t offset, int flags) {
    return paced(fd, iov, count, offset, flags);
}
ssize_t preadv2(int fd, const struct iovec *iov, int count, off_t offset, int flags) {
    return paced(fd, iov, count, offset, flags);
}
ssize_t preadv64(int fd, const struct iovec *iov, int count, off64_t offset) {
    return paced(fd, iov, count, offset, 0);
}
ssize_t preadv(int fd, const struct iovec *iov, int count, off_t offset) {
    return paced(fd, iov, count, offset, 0);
}
