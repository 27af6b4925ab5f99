// Runs a kernel one threadgroup at a time; every thread is a fiber that runs until it waits. Pointers know their buffer
// and check every access.
#pragma once
#include "metal_types.h"

#include <sys/mman.h>
#if !defined(__x86_64__)
#include <ucontext.h>
#define MS_UCONTEXT 1
#endif

namespace ms {
enum State { READY, WAITS_SIMD, WAITS_GROUP, DONE };
constexpr int SIMD_BARRIER = 1;  // the number of that operation, see `together`
constexpr uint WIDTH = 32, MOST = 1024, STACK = 128 * 1024, SLOT = 32, SHARED_LIMIT = 32768, MOST_PASSES = 100000;

struct Thread {
#ifdef MS_UCONTEXT
  ucontext_t context;
#else
  void* stack;
#endif
  State state;
  uint index, lane, simdgroup;
  uint3 in_grid, in_group, group, group_size, groups, grid;
};
struct Simdgroup {  // `slot` holds the operands of an operation, double-buffered
  uint arrived, live, turn, barriers;
  int operation;
  uint mask[2];
  alignas(32) unsigned char slot[2][WIDTH][SLOT];
};
struct Region { const char* name; char *begin, *end; uint shadow; };  // shadow: see Shadow, of threadgroup arrays

static Thread threads[MOST];
static Simdgroup simdgroups[MOST / WIDTH];
static Thread* current;
static uint count, group_arrived, group_live, group_barriers;
static int group_line;
static char message[512];
static const char* error;
static char* stacks;
static int poison;
static void (*body)(const Thread&);
static Region regions[64];  // the buffers, then the threadgroup arrays
static uint region_count;

// ---- fibers
static void entry();
#ifdef MS_UCONTEXT
static ucontext_t main_context;
static void yield() { Thread* t = current; swapcontext(&t->context, &main_context); }
static void resume(Thread& t) { current = &t; swapcontext(&main_context, &t.context); }
static void prepare(Thread& t, char* low) {
  getcontext(&t.context);
  t.context.uc_stack.ss_sp = low;
  t.context.uc_stack.ss_size = STACK;
  t.context.uc_link = nullptr;
  makecontext(&t.context, entry, 0);
}
#else
static void* main_stack;
extern "C" void ms_switch(void** save, void* load);
asm(".text\nms_switch:\n push %rbp\n push %rbx\n push %r12\n push %r13\n push %r14\n push %r15\n mov %rsp,(%rdi)\n"
    " mov %rsi,%rsp\n pop %r15\n pop %r14\n pop %r13\n pop %r12\n pop %rbx\n pop %rbp\n ret\n");
static void yield() { Thread* t = current; ms_switch(&t->stack, main_stack); }
static void resume(Thread& t) { current = &t; ms_switch(&main_stack, t.stack); }
static void prepare(Thread& t, char* low) {
  void** s = (void**)(low + STACK - 16);
  *s = (void*)entry;
  for (int k = 0; k < 6; k++) *--s = nullptr;
  t.stack = s;
}
#endif

// ---- errors: the first one ends the run; the fiber never goes on
template <class... A> [[gnu::noinline, noreturn]] static void fail(const char* format, A... values) {
  if (!error) {
    int n = std::snprintf(message, sizeof message, format, values...);
    const Thread& t = *current;
    std::snprintf(message + n, sizeof message - n, "; thread (%u, %u, %u) of threadgroup (%u, %u, %u)", t.in_group.x,
                  t.in_group.y, t.in_group.z, t.group.x, t.group.y, t.group.z);
    error = message;
  }
  for (;;) yield();
}

// ---- races in threadgroup memory: a byte that one thread writes and another accesses without a barrier in between;
// simdgroup reductions are no barriers. Accesses are logged with the old value; at the thread's next collective
// operation, changed bytes count as writes, all others as reads.
struct Mark { int thread; uint group_barriers, simd_barriers; };
struct Shadow { Mark writer, readers[2]; };
struct Touch { const Region* region; char* at; uint bytes; unsigned char old[SLOT]; };
static Shadow shadows[SHARED_LIMIT];
static Touch touches[4096];
static uint touch_count;
static Mark mark() { return {int(current->index), group_barriers, simdgroups[current->simdgroup].barriers}; }
static bool races(const Mark& m) {
  if (m.thread < 0 || m.thread == int(current->index) || m.group_barriers != group_barriers) return false;
  return uint(m.thread) / WIDTH != current->simdgroup || m.simd_barriers == simdgroups[current->simdgroup].barriers;
}
static void settle() {
  for (uint n = 0; n < touch_count; n++) {
    const Touch& t = touches[n];
    const bool wrote = std::memcmp(t.at, t.old, t.bytes) != 0;
    for (uint b = 0; b < t.bytes; b++) {
      Shadow& s = shadows[t.region->shadow + (t.at - t.region->begin) + b];
      if (races(s.writer) || (wrote && (races(s.readers[0]) || races(s.readers[1]))))
        fail("%s[%ld]: one thread writes it and another one reads or writes it, without a barrier in between",
             t.region->name, long(t.at - t.region->begin) / long(t.bytes));
      if (wrote) s.writer = mark();
      else if (s.readers[0].thread != int(current->index)) { s.readers[1] = s.readers[0]; s.readers[0] = mark(); }
      else s.readers[0] = mark();
    }
  }
  touch_count = 0;
}
static void touch(const Region* r, char* at, uint bytes) {
  if (touch_count == sizeof touches / sizeof *touches) settle();
  Touch& t = touches[touch_count++];
  t.region = r;
  t.at = at;
  t.bytes = bytes;
  std::memcpy(t.old, at, bytes);
}

// ---- checked pointers
enum Space { device_, constant_, threadgroup_ };
static const Region* region_of(const void* p) {
  for (uint i = region_count; i-- > 0;) if (p >= regions[i].begin && p < regions[i].end) return &regions[i];
  fail("a pointer into no buffer");
}
template <Space S, class T> struct ptr {
  T* p;
  const Region* r;
  ptr() : p(nullptr), r(nullptr) {}
  ptr(T* p, const Region* r) : p(p), r(r) {}
  ptr(T* p) : p(p), r(region_of(p)) {}  // from &x[i]
  template <class U> explicit(!std::is_same_v<T, const U>) ptr(const ptr<S, U>& o) : p((T*)o.p), r(o.r) {}
  template <class I> T& operator[](I i) const { return *touched(at(int64_t(i))); }
  T& operator*() const { return *touched(at(0)); }
  T* operator->() const { return at(0); }  // which only atomics use
  template <class I> ptr operator+(I i) const { return ptr((T*)((char*)p + int64_t(i) * int64_t(sizeof(T))), r); }
  template <class I> ptr operator-(I i) const requires std::is_integral_v<I> { return *this + -int64_t(i); }
  int64_t operator-(ptr o) const { return p - o.p; }
  template <class I> ptr& operator+=(I i) { return *this = *this + i; }
  template <class I> ptr& operator-=(I i) { return *this = *this - i; }
  ptr& operator++() { return *this += 1; }
  bool operator==(ptr o) const { return p == o.p; }
  bool operator<(ptr o) const { return p < o.p; }

 private:
  T* touched(T* q) const {
    static_assert(sizeof(T) <= SLOT);
    if (S == threadgroup_) touch(r, (char*)q, sizeof(T));
    return q;
  }
  T* at(int64_t i) const {
    if (!r) fail("a pointer without a value is read");
    char* q = (char*)p + i * int64_t(sizeof(T));
    if (q < r->begin || q + sizeof(T) > r->end)
      fail("%s[%ld] is out of bounds, it has %ld elements", r->name, long(q - r->begin) / long(sizeof(T)),
           long(r->end - r->begin) / long(sizeof(T)));
    if ((q - r->begin) % alignof(T)) fail("%s: byte %ld is not aligned for its type", r->name, long(q - r->begin));
    return (T*)q;
  }
};
template <class P, class Q> P cast(Q q) { return P(q); }  // reinterpret_cast
struct Argument {  // buffer number `index`, as whatever pointer the kernel's signature asks for
  uint index;
  template <Space S, class T> operator ptr<S, T>() const { return {(T*)regions[index].begin, &regions[index]}; }
};
template <class T> T& reference(uint index) { return *(T*)regions[index].begin; }

// ---- threadgroup arrays: poisoned when the first thread of a threadgroup reaches the declaration
static size_t shared_bytes;
static void add_shared(const char* name, char* begin, size_t bytes) {
  for (uint i = 0; i < region_count; i++) if (regions[i].begin == begin) return;
  if ((shared_bytes += (bytes + 15) / 16 * 16) > SHARED_LIMIT) fail("more than 32768 bytes of threadgroup memory");
  std::memset(begin, poison, bytes);
  const uint shadow = shared_bytes - (bytes + 15) / 16 * 16;
  for (size_t b = 0; b < bytes; b++) shadows[shadow + b] = {{-1, 0, 0}, {{-1, 0, 0}, {-1, 0, 0}}};
  regions[region_count++] = {name, begin, begin + bytes, shadow};
}
template <class T, int N> struct shared {
  alignas(16) T data[N];
  ptr<threadgroup_, T> enter(const char* name) {
    add_shared(name, (char*)data, sizeof data);
    return ptr<threadgroup_, T>(data);
  }
};

// ---- barriers and simdgroup operations
static void release(Simdgroup& g, uint index) {
  g.turn++;
  g.arrived = 0;
  g.barriers += g.operation % 32 == SIMD_BARRIER;
  g.mask[g.turn & 1] = 0;
  for (uint i = index * WIDTH; i < std::min(count, index * WIDTH + WIDTH); i++)
    if (threads[i].state == WAITS_SIMD) threads[i].state = READY;
}
[[gnu::noinline]] static void group_barrier(int line, bool orders) {
  settle();
  if (group_live != count) fail("threadgroup_barrier in line %d after a thread of the threadgroup has returned", line);
  if (group_arrived && group_line != line) fail("divergent barriers: threads wait in lines %d and %d", group_line, line);
  group_line = line;
  if (++group_arrived < group_live) { current->state = WAITS_GROUP; yield(); return; }
  group_arrived = 0;
  group_barriers += orders;
  for (uint i = 0; i < count; i++) if (threads[i].state == WAITS_GROUP) threads[i].state = READY;
}
static void entry() {
  body(*current);
  settle();
  Thread& t = *current;
  Simdgroup& g = simdgroups[t.simdgroup];
  t.state = DONE;
  group_live--;
  g.live--;
  if (group_arrived) fail("a thread returned while others wait at threadgroup_barrier in line %d", group_line);
  if (g.arrived && g.arrived == g.live) release(g, t.simdgroup);
  for (;;) yield();
}
// All live lanes must reach the same operation on the same line; then returns f(simdgroup, turn, lane).
template <class T, class F> [[gnu::noinline]] static auto together(int operation, const T& v, F f) {
  static_assert(sizeof(T) <= SLOT);
  settle();
  Thread& t = *current;
  Simdgroup& g = simdgroups[t.simdgroup];
  const uint turn = g.turn & 1;
  if (g.arrived && g.operation != operation)
    fail("divergent simdgroup operations in lines %d and %d", g.operation / 32, operation / 32);
  g.operation = operation;
  std::memcpy(g.slot[turn][t.lane], &v, sizeof(T));
  g.mask[turn] |= 1u << t.lane;
  if (++g.arrived == g.live) release(g, t.simdgroup);
  else { t.state = WAITS_SIMD; yield(); }
  return f(g, turn, t.lane);
}
template <class T> static T lane_value(const Simdgroup& g, uint turn, uint lane) {
  T v;
  std::memcpy(&v, g.slot[turn][lane % WIDTH], sizeof(T));
  return v;
}

// ---- the launch
static void begin_group(const uint* g, const uint* grid, const uint* size, const uint* groups, uint buffers) {
  uint d[3];  // threadgroups at the edges of the grid are smaller
  for (int i = 0; i < 3; i++) d[i] = std::min(size[i], grid[i] - g[i] * size[i]);
  count = group_live = d[0] * d[1] * d[2];
  group_arrived = 0;
  shared_bytes = 0;
  region_count = buffers;
  for (uint s = 0; s * WIDTH < count; s++) {
    Simdgroup& q = simdgroups[s];
    q.arrived = q.turn = q.mask[0] = q.mask[1] = q.barriers = 0;
    q.live = std::min(WIDTH, count - s * WIDTH);
  }
  for (uint i = 0; i < count; i++) {
    Thread& t = threads[i];
    t.state = READY;
    t.index = i;
    t.lane = i % WIDTH;
    t.simdgroup = i / WIDTH;
    t.in_group = uint3(i % d[0], i / d[0] % d[1], i / (d[0] * d[1]));
    t.group = uint3(g[0], g[1], g[2]);
    t.group_size = uint3(d[0], d[1], d[2]);
    t.groups = uint3(groups[0], groups[1], groups[2]);
    t.grid = uint3(grid[0], grid[1], grid[2]);
    t.in_grid = uint3(g[0] * size[0] + t.in_group.x, g[1] * size[1] + t.in_group.y, g[2] * size[2] + t.in_group.z);
    prepare(t, stacks + size_t(i) * STACK);
  }
}
enum Order { FORWARD, REVERSED, SHUFFLED };
static bool run_ready(const uint* turn, uint from, uint to) {
  bool ran = false;
  for (uint k = from; k < to && !error; k++) {
    Thread& t = threads[turn[k]];
    if (t.state == READY) { resume(t); ran = true; }
  }
  return ran;
}
// Forward and reversed: a simdgroup runs as far as it can before the next one, so that a missing barrier shows. Shuffled:
// the threads of all simdgroups interleave.
static void run_group(int order, uint& random) {
  static uint turn[MOST];
  for (uint i = 0; i < count; i++) turn[i] = order == REVERSED ? count - 1 - i : i;
  const uint first = order == REVERSED ? (count - 1) % WIDTH + 1 : WIDTH;  // threads of the first simdgroup
  for (uint passes = 0; group_live && !error; passes++) {
    bool ran = false;
    if (order == SHUFFLED) {
      for (uint i = count - 1; i > 0; i--) {
        random = random * 1664525u + 1013904223u;
        std::swap(turn[i], turn[(random >> 8) % (i + 1)]);
      }
      ran = run_ready(turn, 0, count);
    } else {
      for (uint from = 0, to = first; from < count; from = to, to += WIDTH)
        while (run_ready(turn, from, std::min(to, count)) && passes <= MOST_PASSES) { ran = true; passes++; }
    }
    if (error) return;
    if (passes > MOST_PASSES) error = "the threads wait for each other again and again: a loop without an end?";
    else if (!ran) error = "divergent control flow: threads wait for others that do not come";
  }
}
static const char* run(void (*kernel)(const Thread&), uint buffers, const uint* grid, const uint* size, int order, int fill) {
  if (!stacks)
    stacks = (char*)mmap(nullptr, size_t(MOST) * STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  body = kernel;
  error = nullptr;
  touch_count = 0;
  poison = fill ^ 0x55;  // not what outputs are filled with
  uint groups[3], random = 1;
  if (size_t(size[0]) * size[1] * size[2] > MOST) return "more than 1024 threads in a threadgroup";
  for (int i = 0; i < 3; i++) groups[i] = (grid[i] + size[i] - 1) / size[i];
  for (uint n = 0; n < groups[0] * groups[1] * groups[2] && !error; n++) {
    uint g[3] = {n % groups[0], n / groups[0] % groups[1], n / (groups[0] * groups[1])};
    begin_group(g, grid, size, groups, buffers);
    run_group(order, random);
  }
  return error;
}
}  // namespace ms

// Handlers of -fsanitize=bounds,shift,integer-divide-by-zero: errors in thread-local arrays and arithmetic.
struct ms_place { const char* file; uint32_t line, column; };
extern "C" {
void __ubsan_handle_out_of_bounds(ms_place* at, uintptr_t index) {
  ms::fail("index %ld of a thread's array is out of bounds in line %u", long(index), at->line);
}
void __ubsan_handle_shift_out_of_bounds(ms_place* at, uintptr_t, uintptr_t by) {
  ms::fail("shift by %ld in line %u", long(by), at->line);
}
void __ubsan_handle_divrem_overflow(ms_place* at, uintptr_t, uintptr_t) { ms::fail("division by zero in line %u", at->line); }
}
