/* A load generator that is never the bottleneck: one thread, epoll, each connection asks again once it was answered.
 *
 *     _http_load PORT CONNECTIONS SECONDS BODY_FILE        one warm-up second is not counted
 *
 * Prints: requests, events, errors, seconds, then p50 and p99 in microseconds: of requests, or, where answers are streams,
 * of the time between an event's sending (in its id) and its arrival.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <time.h>
#include <unistd.h>

#define ROOM (1 << 18)
#define SAMPLES (1 << 23)

struct conn {
    int fd;
    char in[ROOM];
    size_t held;
    size_t out_at;
    int heads;       /* the head is read */
    long left;       /* bytes of body to come; -1: chunked */
    unsigned long long asked;
};

static char *request;
static size_t request_bytes;
static unsigned *samples;
static size_t taken;
static unsigned long requests, events, errors;
static int counting, epfd;

static unsigned long long now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000ull + t.tv_nsec;
}

static int by_size(const void *a, const void *b) {
    unsigned x = *(unsigned *)a, y = *(unsigned *)b;
    return x < y ? -1 : x > y;
}

static void sample(unsigned long long ns) {
    if (counting && taken < SAMPLES) samples[taken++] = ns / 1000 > 0xffffffffu ? 0xffffffffu : ns / 1000;
}

static void ask(struct conn *c) {
    if (c->out_at == 0) c->asked = now_ns(), c->heads = 0, c->held = 0;
    while (c->out_at < request_bytes) {
        ssize_t n = send(c->fd, request + c->out_at, request_bytes - c->out_at, MSG_NOSIGNAL);
        if (n < 0) {
            struct epoll_event e = {.events = EPOLLIN | EPOLLOUT, .data.ptr = c};
            epoll_ctl(epfd, EPOLL_CTL_MOD, c->fd, &e);
            return;
        }
        c->out_at += n;
    }
    struct epoll_event e = {.events = EPOLLIN, .data.ptr = c};
    epoll_ctl(epfd, EPOLL_CTL_MOD, c->fd, &e);
}

static void answered(struct conn *c, int stream) {
    if (counting) requests++;
    if (!stream) sample(now_ns() - c->asked);
    c->out_at = 0;
    ask(c);
}

/* Events among what was received; keeps a piece at the end for the next time. */
static void look(struct conn *c) {
    unsigned long long now = now_ns();
    char *at = c->in, *end = c->in + c->held;
    while ((at = memmem(at, end - at, "\"id\":\"0", 7)) && at + 6 + 20 <= end) {
        sample(now - strtoull(at + 6, NULL, 10));
        if (counting) events++;
        at += 26;
    }
}

static int readable(struct conn *c) {
    ssize_t n = recv(c->fd, c->in + c->held, ROOM - 1 - c->held, 0);
    if (n <= 0) return n < 0 && errno == EAGAIN;
    c->held += n;
    c->in[c->held] = 0;
    if (!c->heads) {
        char *end = strstr(c->in, "\r\n\r\n");
        if (!end) return 1;
        if (strncmp(c->in, "HTTP/1.1 200", 12)) { errors += counting; if (errors < 3) fprintf(stderr, "%.200s\n", c->in); }
        c->heads = 1;
        char *line = strcasestr(c->in, "\r\ncontent-length:");
        c->left = line && line < end ? atol(line + 17) : -1;
        size_t head = end + 4 - c->in;
        memmove(c->in, c->in + head, c->held - head);
        c->held -= head;
        c->in[c->held] = 0;
    }
    if (c->left >= 0) {
        if ((long)c->held < c->left) { return 1; }
        answered(c, 0);
        return 1;
    }
    look(c);
    int whole = c->held >= 5 && !memcmp(c->in + c->held - 5, "0\r\n\r\n", 5);
    if (whole) { answered(c, 1); return 1; }
    /* an event cut in two by this read: keep what follows the last complete id */
    char *last = NULL, *at = c->in;
    while ((at = memmem(at, c->in + c->held - at, "\"id\":\"0", 7)) && at + 26 <= c->in + c->held) last = at += 26;
    size_t done = last ? (size_t)(last - c->in) : c->held > 64 ? c->held - 64 : 0;
    memmove(c->in, c->in + done, c->held - done);
    c->held -= done;
    return 1;
}

int main(int argc, char **argv) {
    if (argc < 5) return 2;
    int port = atoi(argv[1]), count = atoi(argv[2]);
    double seconds = atof(argv[3]);
    FILE *file = fopen(argv[4], "rb");
    if (!file) { perror(argv[4]); return 1; }
    static char body[1 << 20];
    size_t length = fread(body, 1, sizeof body, file);
    request = malloc(length + 512);
    request_bytes = sprintf(request, "POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nUser-Agent: load\r\n"
                                     "Accept: application/json\r\nAccept-Encoding: identity\r\n"
                                     "Authorization: Bearer sk-none\r\nContent-Type: application/json\r\n"
                                     "Content-Length: %zu\r\n\r\n", port, length);
    memcpy(request + request_bytes, body, length);
    request_bytes += length;
    samples = malloc(SAMPLES * sizeof *samples);
    epfd = epoll_create1(0);
    struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons(port)};
    to.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    for (int i = 0; i < count; i++) {
        struct conn *c = calloc(1, sizeof *c);
        int on = 1;
        c->fd = socket(AF_INET, SOCK_STREAM, 0);
        if (connect(c->fd, (void *)&to, sizeof to)) { perror("connect"); return 1; }
        setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
        fcntl(c->fd, F_SETFL, O_NONBLOCK);
        struct epoll_event e = {.events = EPOLLIN, .data.ptr = c};
        epoll_ctl(epfd, EPOLL_CTL_ADD, c->fd, &e);
        ask(c);
    }
    struct epoll_event ready[256];
    unsigned long long start = now_ns() + 1000000000ull, stop = start + (unsigned long long)(seconds * 1e9), now;
    puts("going");
    fflush(stdout);
    while ((now = now_ns()) < stop) {
        if (!counting && now >= start) { counting = 1; puts("counting"); fflush(stdout); }
        int n = epoll_wait(epfd, ready, 256, 100);
        for (int i = 0; i < n; i++) {
            struct conn *c = ready[i].data.ptr;
            if (ready[i].events & EPOLLOUT) ask(c);
            if (ready[i].events & (EPOLLIN | EPOLLHUP | EPOLLERR) && !readable(c)) {
                fprintf(stderr, "a connection was closed\n");
                return 1;
            }
        }
    }
    puts("counted");
    fflush(stdout);
    qsort(samples, taken, sizeof *samples, by_size);
    printf("%lu %lu %lu %.6f %u %u\n", requests, events, errors, (now - start) / 1e9,
           taken ? samples[taken / 2] : 0, taken ? samples[taken * 99 / 100] : 0);
    return 0;
}
