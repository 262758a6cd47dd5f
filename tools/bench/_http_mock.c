/* A worker that is never the bottleneck: one thread, epoll, canned answers. For tools/bench/router_http.py.
 *
 *     _http_mock PORT [TABLE]
 *
 * TABLE: a line of three fields, between tabs, for each question that is answered otherwise: the beginning of the
 * request line, the whole body (empty: any), the JSON to answer. `GET /v1/loads`: how many streams it is sending.
 * Any other GET: a short JSON answer. POST: a chat answer of about 300 bytes; or, where the body asks for a stream, `max_tokens`
 * (or `max_completion_tokens`) events, each with the time it was sent in its id (CLOCK_MONOTONIC, ns) and in a write of
 * its own: as fast as the reader takes them when that number is even, 100 a second when it is odd.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <time.h>
#include <unistd.h>

#define MOST 4096
#define ROOM (1 << 20)
#define PACE_NS 10000000ull
#define ENTRIES 64

struct conn {
    int fd;
    char *in;
    size_t held;
    long left;               /* events still to send; -1: none */
    int paced;
    unsigned long long next; /* when */
    char out[512];
    size_t out_at, out_end;
};

static struct conn *conns[MOST];
static int epfd;
static struct { char *line, *body, *say; } table[ENTRIES];
static int entries;

static void read_table(const char *path) {
    FILE *file = fopen(path, "r");
    char *line = NULL;
    size_t room = 0;
    if (!file) { perror(path); exit(1); }
    while (getline(&line, &room, file) > 0) {
        char *rest = strdup(line);
        rest[strcspn(rest, "\n")] = 0;
        if (entries == ENTRIES) { fputs("too many answers\n", stderr); exit(1); }
        table[entries].line = strsep(&rest, "\t"), table[entries].body = strsep(&rest, "\t");
        table[entries++].say = rest;
    }
    free(line);
    fclose(file);
}

/* What the table says to this; NULL: nothing. */
static const char *told(const char *head, const char *body, size_t length) {
    for (int i = 0; i < entries; i++) {
        size_t whole = strlen(table[i].body);
        if (!strncmp(head, table[i].line, strlen(table[i].line)) &&
            (!whole || (whole == length && !memcmp(body, table[i].body, length)))) return table[i].say;
    }
    return NULL;
}

static unsigned long long now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000ull + t.tv_nsec;
}

static void watch(struct conn *c, unsigned events) {
    struct epoll_event e = {.events = events, .data.fd = c->fd};
    epoll_ctl(epfd, EPOLL_CTL_MOD, c->fd, &e);
}

static void drop(struct conn *c) {
    conns[c->fd] = NULL;
    close(c->fd);
    free(c->in);
    free(c);
}

/* 1: all of it left; 0: the reader is full; -1: gone */
static int flush(struct conn *c) {
    while (c->out_at < c->out_end) {
        ssize_t n = send(c->fd, c->out + c->out_at, c->out_end - c->out_at, MSG_NOSIGNAL);
        if (n < 0) return errno == EAGAIN ? 0 : -1;
        c->out_at += n;
    }
    c->out_at = c->out_end = 0;
    return 1;
}

static void put_event(struct conn *c) {
    char event[400];
    int n = snprintf(event, sizeof event,
                     "data: {\"id\":\"%020llu\",\"object\":\"chat.completion.chunk\",\"created\":1700000000,"
                     "\"model\":\"mock\",\"choices\":[{\"index\":0,\"delta\":{\"content\":\" token\"},"
                     "\"finish_reason\":%s}]}\n\n", now_ns(), c->left == 1 ? "\"stop\"" : "null");
    c->out_end = snprintf(c->out, sizeof c->out, "%x\r\n%s\r\n", n, event);
    c->out_at = 0;
}

/* Send events until the reader is full, or it is not yet time. */
static int stream(struct conn *c) {
    for (int burst = 0; burst < 16; burst++) {
        int sent = flush(c);
        if (sent <= 0) {
            if (!sent) watch(c, EPOLLIN | EPOLLOUT);
            return sent;
        }
        if (c->left == 0) {
            c->left = -1;
            c->out_end = snprintf(c->out, sizeof c->out, "e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n");
            if (flush(c) < 0) return -1;
            watch(c, EPOLLIN);
            return 1;
        }
        if (c->paced) {
            unsigned long long now = now_ns();
            if (now < c->next) { watch(c, EPOLLIN); return 1; }
            c->next += PACE_NS;
        }
        put_event(c);
        c->left--;
    }
    watch(c, EPOLLIN | (c->paced ? 0 : EPOLLOUT)); /* the others' turn */
    return 1;
}

static int answer(struct conn *c, const char *head, const char *body, size_t length) {
    static const char *chat =
        "{\"id\":\"chatcmpl-1\",\"object\":\"chat.completion\",\"created\":1700000000,\"model\":\"mock\",\"choices\":"
        "[{\"index\":0,\"message\":{\"role\":\"assistant\",\"content\":\"Hello there, this is a canned answer.\"},"
        "\"logprobs\":null,\"finish_reason\":\"stop\"}],\"usage\":{\"prompt_tokens\":10,\"completion_tokens\":8,"
        "\"total_tokens\":18}}";
    static const char *about =
        "{\"status\":\"ok\",\"model_path\":\"mock\",\"served_model_name\":\"mock\",\"tokenizer_path\":\"\","
        "\"is_generation\":true,\"version\":\"0.5.23\",\"object\":\"list\",\"data\":[{\"id\":\"mock\",\"object\":\"model\"}]}";
    char out[1024];
    if (head[0] == 'P' && (memmem(body, length, "\"stream\":true", 13) || memmem(body, length, "\"stream\": true", 14))) {
        /* sglang-router renames max_tokens to max_completion_tokens */
        const char *max = memmem(body, length, "_tokens\":", 9);
        c->left = max ? atol(max + 9) : 16;
        c->paced = c->left % 2;
        c->next = now_ns();
        int n = snprintf(out, sizeof out, "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"
                                          "transfer-encoding: chunked\r\n\r\n");
        if (send(c->fd, out, n, MSG_NOSIGNAL) != n) return -1;
        return stream(c);
    }
    char load[200];
    const char *say = told(head, body, length);
    if (!say && !strncmp(head, "GET /v1/loads", 13)) {
        int sending = 0;
        for (int fd = 0; fd < MOST; fd++) sending += conns[fd] && conns[fd]->left >= 0;
        snprintf(load, sizeof load, "{\"loads\":[{\"num_running_reqs\":%d,\"max_total_num_tokens\":%d}]}", sending,
                 1 << 30);
        say = load;
    }
    if (!say) say = head[0] == 'P' ? chat : about;
    int all = strlen(say);
    int n = snprintf(out, sizeof out, "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n", all);
    if (n + all < (int)sizeof out) { /* the usual answers, in one piece */
        memcpy(out + n, say, all);
        return send(c->fd, out, n + all, MSG_NOSIGNAL) == n + all ? 1 : -1;
    }
    if (send(c->fd, out, n, MSG_NOSIGNAL | MSG_MORE) != n) return -1;
    return send(c->fd, say, all, MSG_NOSIGNAL) == all ? 1 : -1;
}

static int readable(struct conn *c) {
    ssize_t n = recv(c->fd, c->in + c->held, ROOM - 1 - c->held, 0);
    if (n <= 0) return n < 0 && errno == EAGAIN ? 1 : -1;
    c->held += n;
    c->in[c->held] = 0;
    char *end = strstr(c->in, "\r\n\r\n");
    if (!end) return 1;
    size_t head = end + 4 - c->in, length = 0;
    char *line = strcasestr(c->in, "\r\ncontent-length:");
    if (line && line < end) length = strtoul(line + 17, NULL, 10);
    if (c->held < head + length) return 1;
    c->held = 0;
    return answer(c, c->in, c->in + head, length);
}

int main(int argc, char **argv) {
    if (argc > 2) read_table(argv[2]);
    int on = 1, listening = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
    struct sockaddr_in at = {.sin_family = AF_INET, .sin_port = htons(argc > 1 ? atoi(argv[1]) : 0)};
    at.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    setsockopt(listening, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    if (bind(listening, (void *)&at, sizeof at) || listen(listening, 1024)) { perror("listen"); return 1; }
    epfd = epoll_create1(0);
    struct epoll_event e = {.events = EPOLLIN, .data.fd = listening}, ready[256];
    epoll_ctl(epfd, EPOLL_CTL_ADD, listening, &e);
    puts("ready");
    fflush(stdout);
    int streams = 0;
    for (;;) {
        int n = epoll_wait(epfd, ready, 256, streams ? 1 : 1000);
        for (int i = 0; i < n; i++) {
            int fd = ready[i].data.fd;
            if (fd == listening) {
                int peer = accept4(listening, NULL, NULL, SOCK_NONBLOCK);
                if (peer < 0) continue;
                if (peer >= MOST) { close(peer); continue; }
                setsockopt(peer, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
                struct conn *c = conns[peer] = calloc(1, sizeof *c);
                c->fd = peer, c->in = malloc(ROOM), c->left = -1;
                struct epoll_event p = {.events = EPOLLIN, .data.fd = peer};
                epoll_ctl(epfd, EPOLL_CTL_ADD, peer, &p);
                continue;
            }
            struct conn *c = conns[fd];
            int fine = 1;
            if (c && ready[i].events & (EPOLLIN | EPOLLHUP | EPOLLERR)) fine = readable(c);
            if (c && fine > 0 && ready[i].events & EPOLLOUT && c->left >= 0) fine = stream(c);
            if (c && fine < 0) drop(c);
        }
        streams = 0;
        for (int fd = 0; fd < MOST; fd++) {
            struct conn *c = conns[fd];
            if (!c || c->left < 0 || !c->paced) continue;
            streams++;
            if (stream(c) < 0) drop(c);
        }
    }
}
