/* Many connections at once: flows ADDRESS PORT COUNT
 *
 * Opens COUNT TCP connections to an echo server, all at the same time, sends four bytes on each, and waits until all
 * four have come back on every one while every one is still open. Prints "FLOWS n of COUNT in T ms" and ends with 0
 * when n is COUNT. Static, for guests without libraries: gcc -O2 -static -o flows flows.c */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

struct flow {
    int fd;
    int sent;
    int got;
    uint32_t echo;
};

static double now_ms(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1e3 + t.tv_nsec / 1e6;
}

static int begin(const char *address, int port)
{
    struct sockaddr_in v4 = { .sin_family = AF_INET, .sin_port = htons(port) };
    struct sockaddr_in6 v6 = { .sin6_family = AF_INET6, .sin6_port = htons(port) };
    int is6 = strchr(address, ':') != NULL;
    if (inet_pton(is6 ? AF_INET6 : AF_INET, address, is6 ? (void *)&v6.sin6_addr : (void *)&v4.sin_addr) != 1)
        return -1;
    int fd = socket(is6 ? AF_INET6 : AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
    if (fd < 0)
        return -1;
    const struct sockaddr *to = is6 ? (void *)&v6 : (void *)&v4;
    if (connect(fd, to, is6 ? sizeof v6 : sizeof v4) < 0 && errno != EINPROGRESS) {
        close(fd);
        return -1;
    }
    return fd;
}

/* 1 when the flow is done, -1 when it failed. */
static int step(struct flow *flow, uint32_t number)
{
    if (!flow->sent) {
        int error = 0;
        socklen_t length = sizeof error;
        getsockopt(flow->fd, SOL_SOCKET, SO_ERROR, &error, &length);
        if (error)
            return -1;
        if (write(flow->fd, &number, sizeof number) != sizeof number)
            return errno == EAGAIN || errno == ENOTCONN ? 0 : -1;
        flow->sent = 1;
    }
    while (flow->got < (int)sizeof flow->echo) {
        int n = read(flow->fd, (char *)&flow->echo + flow->got, sizeof flow->echo - flow->got);
        if (n < 0 && errno == EAGAIN)
            return 0;
        if (n <= 0)
            return -1;
        flow->got += n;
    }
    return flow->echo == number ? 1 : -1;
}

int main(int argc, char **argv)
{
    if (argc < 4) {
        fprintf(stderr, "usage: flows ADDRESS PORT COUNT\n");
        return 2;
    }
    int port = atoi(argv[2]), count = atoi(argv[3]), done = 0, failed = 0;
    struct rlimit limit = { count + 64, count + 64 };
    setrlimit(RLIMIT_NOFILE, &limit);
    struct flow *flows = calloc(count, sizeof *flows);
    int epoll = epoll_create1(0);
    double start = now_ms();
    for (int i = 0; i < count; i++) {
        flows[i].fd = begin(argv[1], port);
        if (flows[i].fd < 0) {
            failed++;
            continue;
        }
        struct epoll_event event = { .events = EPOLLIN | EPOLLOUT | EPOLLET, .data.u32 = i };
        epoll_ctl(epoll, EPOLL_CTL_ADD, flows[i].fd, &event);
    }
    while (done + failed < count && now_ms() - start < 300e3) {
        struct epoll_event events[256];
        int n = epoll_wait(epoll, events, 256, 1000);
        for (int e = 0; e < n; e++) {
            struct flow *flow = &flows[events[e].data.u32];
            if (flow->got == sizeof flow->echo || flow->got < 0)
                continue;
            int result = step(flow, events[e].data.u32);
            done += result > 0;
            if (result < 0) {
                failed++;
                flow->got = -1;
            }
        }
    }
    printf("FLOWS %d of %d in %.0f ms\n", done, count, now_ms() - start);
    return done == count ? 0 : 1;
}
