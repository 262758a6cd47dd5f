/* A load generator that is never the bottleneck: one thread, epoll, each connection asks again once it was answered.
 *
 *     _http_load PORT CONNECTIONS SECONDS BODIES        one warm-up second is not counted
 *
 * BODIES: a body on each line; an empty line ends a conversation. A connection sends the bodies of a conversation in
 * their order, then those of the next that nobody has begun, the first after the last. Where a body has MARK, a number
 * is sent that each conversation gets when it is begun, so no two begun ones are the same from there on.
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
#define MARK "################"
#define DIGITS 16

struct conn {
    int fd;
    char in[ROOM];
    size_t held;
    char *out;       /* the request */
    size_t out_at, out_end;
    struct body *next, *last; /* of its conversation: what it asks next, and where that ends */
    unsigned long long number;
    int heads;       /* the head is read */
    long left;       /* bytes of body to come; -1: chunked */
    unsigned long long asked;
};

struct body {
    char *at, *mark;
    size_t length;
};

struct conversation {
    struct body *first, *last;
};

static struct body *bodies;
static struct conversation *conversations;
static size_t conversation_count, begun, longest;
static unsigned long long numbers; /* of this run's conversations start here */
static int port;
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

static void read_bodies(const char *path) {
    FILE *file = fopen(path, "rb");
    if (!file || fseek(file, 0, SEEK_END)) { perror(path); exit(1); }
    size_t size = ftell(file), lines = 0, count = 0;
    char *all = malloc(size + 1), *end = all + size;
    rewind(file);
    if (fread(all, 1, size, file) != size) { perror(path); exit(1); }
    *end = 0;
    fclose(file);
    for (char *at = all; (at = memchr(at, '\n', end - at)); at++) lines++;
    bodies = calloc(lines + 1, sizeof *bodies);
    conversations = calloc(lines + 1, sizeof *conversations);
    struct body *first = bodies;
    for (char *at = all, *stop; at < end && (stop = memchr(at, '\n', end - at)); at = stop + 1) {
        if (stop == at) {
            conversations[conversation_count++] = (struct conversation){first, bodies + count};
            first = bodies + count;
            continue;
        }
        bodies[count++] = (struct body){at, memmem(at, stop - at, MARK, DIGITS), stop - at};
        if ((size_t)(stop - at) > longest) longest = stop - at;
    }
    if (!conversation_count) { fprintf(stderr, "no conversation in %s\n", path); exit(1); }
}

/* The next request of its conversation, or the first of the next one. */
static void write_request(struct conn *c) {
    if (c->next == c->last) {
        struct conversation *next = &conversations[begun % conversation_count];
        c->next = next->first, c->last = next->last;
        c->number = (numbers + begun++) * 0x9E3779B97F4A7C15ull; /* other ones from the first digit on */
    }
    struct body *body = c->next++;
    int head = sprintf(c->out, "POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nUser-Agent: load\r\n"
                               "Accept: application/json\r\nAccept-Encoding: identity\r\n"
                               "Authorization: Bearer sk-none\r\nContent-Type: application/json\r\n"
                               "Content-Length: %zu\r\n\r\n", port, body->length);
    memcpy(c->out + head, body->at, body->length);
    c->out_end = head + body->length;
    if (body->mark) {
        char digits[DIGITS + 1];
        sprintf(digits, "%016llx", c->number);
        memcpy(c->out + head + (body->mark - body->at), digits, DIGITS);
    }
}

static void ask(struct conn *c) {
    if (c->out_at == 0) write_request(c), c->asked = now_ns(), c->heads = 0, c->held = 0;
    while (c->out_at < c->out_end) {
        ssize_t n = send(c->fd, c->out + c->out_at, c->out_end - c->out_at, MSG_NOSIGNAL);
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
    int count = atoi(argv[2]);
    double seconds = atof(argv[3]);
    port = atoi(argv[1]);
    read_bodies(argv[4]);
    numbers = (unsigned long long)getpid() << 40 ^ now_ns();
    samples = malloc(SAMPLES * sizeof *samples);
    epfd = epoll_create1(0);
    struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons(port)};
    to.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    for (int i = 0; i < count; i++) {
        struct conn *c = calloc(1, sizeof *c);
        int on = 1;
        c->out = malloc(longest + 512);
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
