// loadgen: the small-packet half of bench.sh. One process holds both ends: a
// socket stays in the namespace it was made in, so one clock and one count cover
// sender and receiver. Prints one JSON object.
//
//   loadgen udp    size=64 secs=2 [pps=N] [flows=1]  paced, or as fast as it goes
//   loadgen search size=64 secs=3 [loss=0.5] [flows=1] highest pace with at most that loss in %
//   loadgen rtt    size=64 secs=2                    ping-pong, one packet in flight
//   loadgen crr    secs=2                            TCP connect, request, reply, close
//   loadgen tcp    secs=2                            one bulk stream (where iperf3 is missing)
//
// Always: from=NETNS to=NETNS dst=ADDRESS; optional: cpu=A,B pins the two ends.
// Flows differ in destination port and are sent packet by packet in turn.
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { PORT = 7100, BURST = 64, MAX_FLOWS = 256, MAX_SIZE = 65000, TICK_NS = 100000 };

static struct {
    const char *from, *to, *dst;
    int size, flows, cpu_from, cpu_to;
    double secs, pps, loss;
} opt = {.size = 64, .flows = 1, .cpu_from = -1, .cpu_to = -1, .secs = 2, .loss = 0.5};

static atomic_bool stop;

static void fail(const char *what) {
    fprintf(stderr, "loadgen: %s: %s\n", what, strerror(errno));
    exit(1);
}

static double seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec / 1e9;
}

static void enter_netns(const char *name) {
    char path[256];
    snprintf(path, sizeof path, "/run/netns/%s", name);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0 || setns(fd, CLONE_NEWNET) < 0) fail(path);
    close(fd);
}

static void pin(int cpu) {
    if (cpu < 0) return;
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(cpu, &set);
    if (sched_setaffinity(0, sizeof set, &set) < 0) fail("cpu");
}

static socklen_t endpoint(struct sockaddr_storage *out, const char *ip, int port) {
    memset(out, 0, sizeof *out);
    struct sockaddr_in *v4 = (void *)out;
    struct sockaddr_in6 *v6 = (void *)out;
    if (inet_pton(AF_INET, ip, &v4->sin_addr) == 1) {
        v4->sin_family = AF_INET;
        v4->sin_port = htons(port);
        return sizeof *v4;
    }
    if (inet_pton(AF_INET6, ip, &v6->sin6_addr) == 1) {
        v6->sin6_family = AF_INET6;
        v6->sin6_port = htons(port);
        return sizeof *v6;
    }
    errno = EINVAL;
    fail(ip);
    return 0;
}

static int sock(int type, int rcvbuf) {
    int family = strchr(opt.dst, ':') ? AF_INET6 : AF_INET;
    int fd = socket(family, type | SOCK_CLOEXEC, 0), one = 1, snd = 1 << 20;
    if (fd < 0) fail("socket");
    struct timeval tv = {.tv_usec = 50000}; // so that loops look at `stop`
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &tv, sizeof tv);
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    if (type == SOCK_DGRAM && rcvbuf) {
        setsockopt(fd, SOL_SOCKET, SO_RCVBUFFORCE, &rcvbuf, sizeof rcvbuf);
        setsockopt(fd, SOL_SOCKET, SO_SNDBUFFORCE, &snd, sizeof snd);
    }
    return fd;
}

static void bind_dst(int fd, int port) {
    struct sockaddr_storage a;
    socklen_t n = endpoint(&a, opt.dst, port);
    if (bind(fd, (void *)&a, n) < 0) fail("bind");
}

// ------------------------------------------------------------------- udp

struct stamp {
    uint32_t flow, seq, run;
};

static int sinks[MAX_FLOWS], source;
static struct sockaddr_storage target[MAX_FLOWS];
static socklen_t target_len;
static uint32_t run_id;
static atomic_ullong received, reordered;

static void sink_drain(int fd, int flags) {
    static struct mmsghdr m[BURST];
    static struct iovec v[BURST];
    static char buf[BURST][2048];
    static uint32_t next[MAX_FLOWS], seen_run;
    for (int i = 0; i < BURST; i++) {
        v[i] = (struct iovec){buf[i], sizeof buf[i]};
        m[i].msg_hdr = (struct msghdr){.msg_iov = &v[i], .msg_iovlen = 1};
    }
    int n = recvmmsg(fd, m, BURST, flags, NULL);
    for (int i = 0; i < n; i++) {
        struct stamp s;
        if (m[i].msg_len < sizeof s) continue;
        memcpy(&s, buf[i], sizeof s);
        if (s.run != run_id || s.flow >= MAX_FLOWS) continue; // a straggler of an earlier run
        if (seen_run != run_id) {
            memset(next, 0, sizeof next);
            seen_run = run_id;
        }
        if (s.seq < next[s.flow]) reordered++;
        else next[s.flow] = s.seq + 1;
        received++;
    }
}

static void *sink_main(void *arg) {
    (void)arg;
    pin(opt.cpu_to);
    if (opt.flows == 1) {
        while (!stop) sink_drain(sinks[0], MSG_WAITFORONE);
        return NULL;
    }
    int ep = epoll_create1(EPOLL_CLOEXEC);
    for (int i = 0; i < opt.flows; i++) {
        struct epoll_event e = {.events = EPOLLIN, .data.fd = sinks[i]};
        if (epoll_ctl(ep, EPOLL_CTL_ADD, sinks[i], &e) < 0) fail("epoll");
    }
    while (!stop) {
        struct epoll_event e[MAX_FLOWS];
        int n = epoll_wait(ep, e, MAX_FLOWS, 50);
        for (int i = 0; i < n; i++) sink_drain(e[i].data.fd, MSG_DONTWAIT);
    }
    close(ep);
    return NULL;
}

struct result {
    double offered, received, loss, reordered;
};

// Sends for `secs` at `pps` (0: without a pause), then waits for what is under way.
static struct result udp_run(double pps, double secs) {
    static struct mmsghdr m[BURST];
    static struct iovec v[BURST];
    static char *buf;
    static uint32_t seq[MAX_FLOWS];
    if (!buf && !(buf = calloc(BURST, opt.size))) fail("memory");
    memset(seq, 0, sizeof seq);
    run_id++;
    received = reordered = 0;

    double start = seconds(), now, skipped = 0;
    uint64_t sent = 0, turn = 0;
    while ((now = seconds()) - start < secs) {
        int want = BURST;
        if (pps > 0) {
            double due = (now - start) * pps - skipped - sent;
            if (due > pps / 100 + BURST) { // 10 ms behind: that load is not offered, no burst later
                skipped += due - BURST;
                due = BURST;
            }
            if (due < 1) {
                struct timespec t = {.tv_nsec = TICK_NS};
                clock_nanosleep(CLOCK_MONOTONIC, 0, &t, NULL);
                continue;
            }
            if (due < want) want = due;
        }
        for (int i = 0; i < want; i++) {
            uint32_t flow = (turn + i) % opt.flows;
            struct stamp s = {flow, seq[flow]++, run_id};
            memcpy(buf + (size_t)i * opt.size, &s, sizeof s);
            v[i] = (struct iovec){buf + (size_t)i * opt.size, opt.size};
            m[i].msg_hdr = (struct msghdr){.msg_name = &target[flow], .msg_namelen = target_len, .msg_iov = &v[i], .msg_iovlen = 1};
        }
        int n = sendmmsg(source, m, want, 0);
        if (n < 0) {
            if (errno != ENOBUFS && errno != EAGAIN && errno != ECONNREFUSED) fail("send");
            n = 0;
        }
        for (int i = n; i < want; i++) seq[(turn + i) % opt.flows]--; // not sent: the same number again
        sent += n;
        turn += n;
    }
    double took = seconds() - start;
    unsigned long long last = ~0ULL;
    for (int i = 0; i < 10 && (last != received || i < 2); i++) {
        last = received;
        usleep(30000);
    }
    return (struct result){sent / took, received / took, sent ? 100.0 * (1 - (double)received / sent) : 100, reordered};
}

static void udp_open(pthread_t *t) {
    enter_netns(opt.to);
    for (int i = 0; i < opt.flows; i++) {
        sinks[i] = sock(SOCK_DGRAM, opt.flows == 1 ? 4 << 20 : 1 << 20);
        bind_dst(sinks[i], PORT + i);
        target_len = endpoint(&target[i], opt.dst, PORT + i);
    }
    enter_netns(opt.from);
    source = sock(SOCK_DGRAM, 1 << 20);
    if (pthread_create(t, NULL, sink_main, NULL)) fail("thread");
    pin(opt.cpu_from);
    prctl(PR_SET_TIMERSLACK, 1000UL);
    udp_run(2000, 0.1); // neighbours, caches, and a thread that is awake
}

static void udp(void) {
    pthread_t t;
    udp_open(&t);
    struct result r = udp_run(opt.pps, opt.secs);
    printf("{\"offered_pps\":%.0f,\"received_pps\":%.0f,\"loss_pct\":%.3f,\"reordered\":%.0f}\n", r.offered, r.received, r.loss,
           r.reordered);
    stop = true;
    pthread_join(t, NULL);
}

static bool sustains(double pps, double secs) { // one of two tries: a busy machine has its own hiccups
    for (int i = 0; i < 2; i++) {
        struct result r = udp_run(pps, secs);
        if (r.loss <= opt.loss && r.offered >= 0.97 * pps) return true;
    }
    return false;
}

static void search(void) {
    pthread_t t;
    udp_open(&t);
    double piece = opt.secs / 8 < 0.25 ? 0.25 : opt.secs / 8;
    double lo = 0, hi = 0, try = udp_run(0, piece).received;
    if (try < 1000) try = 1000;
    for (int i = 0; i < 12 && (!hi || !lo || hi / lo > 1.02); i++) {
        if (sustains(try, piece)) {
            lo = try;
            try = hi ? (lo + hi) / 2 : lo * 1.2;
        } else {
            hi = try;
            try = lo ? (lo + hi) / 2 : hi * 0.75;
        }
    }
    printf("{\"pps\":%.0f}\n", lo);
    stop = true;
    pthread_join(t, NULL);
}

// ------------------------------------------------------------------- rtt

static void *echo_main(void *arg) {
    int fd = *(int *)arg;
    static char buf[MAX_SIZE];
    pin(opt.cpu_to);
    while (!stop) {
        struct sockaddr_storage a;
        socklen_t n = sizeof a;
        ssize_t len = recvfrom(fd, buf, sizeof buf, 0, (void *)&a, &n);
        if (len > 0 && sendto(fd, buf, len, 0, (void *)&a, n) < 0 && errno != ENOBUFS) fail("echo");
    }
    return NULL;
}

static int ascending(const void *a, const void *b) {
    float x = *(const float *)a, y = *(const float *)b;
    return (x > y) - (x < y);
}

static void rtt(void) {
    enum { MAX_SAMPLES = 4000000 };
    static char out[MAX_SIZE], in[MAX_SIZE];
    float *us = malloc(MAX_SAMPLES * sizeof *us);
    if (!us) fail("memory");
    enter_netns(opt.to);
    int server = sock(SOCK_DGRAM, 1 << 20);
    bind_dst(server, PORT);
    enter_netns(opt.from);
    int client = sock(SOCK_DGRAM, 1 << 20);
    struct sockaddr_storage a;
    socklen_t an = endpoint(&a, opt.dst, PORT);
    if (connect(client, (void *)&a, an) < 0) fail("connect");
    pthread_t t;
    if (pthread_create(&t, NULL, echo_main, &server)) fail("thread");
    pin(opt.cpu_from);

    uint64_t n = 0, lost = 0, seq = 0;
    double sum = 0, begin = seconds() + 0.1, end = begin + opt.secs; // the first 0.1 s is not counted
    while (seconds() < end && n < MAX_SAMPLES) {
        memcpy(out, &(uint64_t){++seq}, 8);
        double t0 = seconds();
        if (send(client, out, opt.size, 0) < 0 && errno != ENOBUFS) fail("send");
        uint64_t got = 0;
        while (got != seq) {
            ssize_t len = recv(client, in, sizeof in, 0);
            if (len < 0) break;
            memcpy(&got, in, 8);
        }
        double t1 = seconds();
        if (t0 < begin) continue;
        if (got != seq) {
            lost++;
            continue;
        }
        us[n++] = (t1 - t0) * 1e6;
        sum += (t1 - t0) * 1e6;
    }
    stop = true;
    pthread_join(t, NULL);
    if (!n) {
        errno = ETIMEDOUT;
        fail("no answer");
    }
    qsort(us, n, sizeof *us, ascending);
    printf("{\"p50_us\":%.1f,\"p99_us\":%.1f,\"max_us\":%.1f,\"mean_us\":%.1f,\"count\":%llu,\"lost\":%llu}\n", us[n / 2],
           us[n * 99 / 100], us[n - 1], sum / n, (unsigned long long)n, (unsigned long long)lost);
}

// ------------------------------------------------------------------- tcp

static int listener(void) {
    enter_netns(opt.to);
    int fd = sock(SOCK_STREAM, 0);
    bind_dst(fd, PORT);
    if (listen(fd, 1024) < 0) fail("listen");
    return fd;
}

static void *reply_main(void *arg) {
    int l = *(int *)arg;
    char c;
    pin(opt.cpu_to);
    while (!stop) {
        int fd = accept(l, NULL, NULL);
        if (fd < 0) continue;
        if (read(fd, &c, 1) == 1 && write(fd, &c, 1) != 1) fail("reply");
        close(fd); // the server closes first, so that TIME_WAIT does not eat the client's ports
    }
    return NULL;
}

static bool crr_once(const struct sockaddr_storage *a, socklen_t an) {
    int fd = sock(SOCK_STREAM, 0), one = 1;
    struct timeval tv = {.tv_sec = 1};
    char c = 'x';
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &tv, sizeof tv);
    setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &tv, sizeof tv);
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    bool ok = connect(fd, (const void *)a, an) == 0 && write(fd, &c, 1) == 1 && read(fd, &c, 1) == 1 && read(fd, &c, 1) == 0;
    close(fd);
    return ok;
}

static void crr(void) {
    int l = listener();
    enter_netns(opt.from);
    struct sockaddr_storage a;
    socklen_t an = endpoint(&a, opt.dst, PORT);
    pthread_t t;
    if (pthread_create(&t, NULL, reply_main, &l)) fail("thread");
    pin(opt.cpu_from);
    uint64_t done = 0, failed = 0;
    double start = seconds();
    while (seconds() - start < opt.secs) {
        if (crr_once(&a, an)) done++;
        else failed++;
    }
    double took = seconds() - start;
    stop = true;
    pthread_join(t, NULL);
    printf("{\"per_s\":%.0f,\"failed\":%llu}\n", done / took, (unsigned long long)failed);
}

static void *count_main(void *arg) {
    int l = *(int *)arg, fd;
    static char buf[1 << 18];
    pin(opt.cpu_to);
    while ((fd = accept(l, NULL, NULL)) < 0 && !stop) {
    }
    while (fd >= 0) {
        ssize_t n = read(fd, buf, sizeof buf);
        if (n > 0) received += n;
        else if (n == 0) break;
        else if (errno != EAGAIN || stop) break;
    }
    return NULL;
}

static void tcp(void) {
    static char buf[1 << 17];
    int l = listener();
    enter_netns(opt.from);
    int fd = sock(SOCK_STREAM, 0);
    struct timeval tv = {.tv_sec = 3};
    setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &tv, sizeof tv);
    setsockopt(fd, IPPROTO_TCP, TCP_CONGESTION, "cubic", 5);
    pthread_t t;
    if (pthread_create(&t, NULL, count_main, &l)) fail("thread");
    pin(opt.cpu_from);
    struct sockaddr_storage a;
    socklen_t an = endpoint(&a, opt.dst, PORT);
    if (connect(fd, (void *)&a, an) < 0) fail("connect");
    double start = seconds();
    while (seconds() - start < opt.secs)
        if (write(fd, buf, sizeof buf) < 0) fail("write");
    double took = seconds() - start, bytes = received;
    stop = true;
    close(fd);
    pthread_join(t, NULL);
    printf("{\"gbps\":%.3f}\n", bytes * 8 / took / 1e9);
}

static void usage(void) {
    fputs("usage: loadgen udp|search|rtt|crr|tcp from=NETNS to=NETNS dst=ADDRESS [size=] [secs=] [pps=] [flows=] [loss=] [cpu=A,B]\n",
          stderr);
    exit(2);
}

int main(int argc, char **argv) {
    if (argc < 2) usage();
    for (int i = 2; i < argc; i++) {
        char *key = argv[i], *value = strchr(key, '=');
        if (!value) usage();
        *value++ = 0;
        if (!strcmp(key, "from")) opt.from = value;
        else if (!strcmp(key, "to")) opt.to = value;
        else if (!strcmp(key, "dst")) opt.dst = value;
        else if (!strcmp(key, "size")) opt.size = atoi(value);
        else if (!strcmp(key, "secs")) opt.secs = atof(value);
        else if (!strcmp(key, "pps")) opt.pps = atof(value);
        else if (!strcmp(key, "flows")) opt.flows = atoi(value);
        else if (!strcmp(key, "loss")) opt.loss = atof(value);
        else if (!strcmp(key, "cpu")) {
            if (sscanf(value, "%d,%d", &opt.cpu_from, &opt.cpu_to) != 2) usage();
        } else usage();
    }
    if (!opt.from || !opt.to || !opt.dst || opt.flows < 1 || opt.flows > MAX_FLOWS || opt.secs <= 0 ||
        opt.size < (int)sizeof(struct stamp) || opt.size > MAX_SIZE)
        usage();
    const char *mode = argv[1];
    if (!strcmp(mode, "udp")) udp();
    else if (!strcmp(mode, "search")) search();
    else if (!strcmp(mode, "rtt")) rtt();
    else if (!strcmp(mode, "crr")) crr();
    else if (!strcmp(mode, "tcp")) tcp();
    else usage();
    return 0;
}
