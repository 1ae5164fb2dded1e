// As much of an operating system as one statically linked program of one thread needs: it loads the program that the
// boot loader brought along, answers the few system calls of the C library's start and of printf, and prints.
#include <stdint.h>

enum { kConsole = 0xE9, kPower = 0x8900 };  // Bochs: a character to its terminal; "Shutdown" ends it
enum { kHeap = 0x20000000, kHeapEnd = 0x28000000, kProgramStack = 0x1FF00000, kImage = 0x30000000 };
enum { kFsBase = 0xC0000100, kStar = 0xC0000081, kSyscallEntry = 0xC0000082 };

extern char traps[];
void system_call(void);
void enter(uint64_t where, uint64_t stack);

static void out(uint16_t port, char byte) { __asm__ volatile("outb %0, %1" ::"a"(byte), "Nd"(port)); }

static void set_register(uint32_t number, uint64_t value) {
  __asm__ volatile("wrmsr" ::"c"(number), "a"((uint32_t)value), "d"((uint32_t)(value >> 32)));
}

static void write_text(const char* text, uint64_t size) {
  for (uint64_t i = 0; i < size; ++i) out(kConsole, text[i]);
}

static void say(const char* text, uint64_t number) {
  while (*text) out(kConsole, *text++);
  for (int shift = 60; shift >= 0; shift -= 4) out(kConsole, "0123456789abcdef"[number >> shift & 15]);
  out(kConsole, '\n');
}

static void power_off(void) {
  for (const char* c = "Shutdown"; *c; ++c) out(kPower, *c);
  for (;;) __asm__ volatile("hlt");
}

void report(uint64_t number, const uint64_t* pushed) {
  say("exception ", number);
  for (int i = 0; i < 4; ++i) say("  on the stack ", pushed[i]);
  power_off();
}

// Linux's calls by number; what is not here does not exist (ENOSYS), and the C library goes on without.
long serve(long number, uint64_t a, uint64_t b, uint64_t c) {
  enum { kWrite = 1, kMmap = 9, kMprotect = 10, kMunmap = 11, kBrk = 12, kWritev = 20, kArchPrctl = 158 };
  enum { kFutex = 202, kSetTidAddress = 218, kExitGroup = 231, kSetRobustList = 273, kGetRandom = 318 };
  enum { kSetFs = 0x1002, kRequestPermission = 0x1023 };
  static uint64_t heap = kHeap, mapped = kHeapEnd;
  switch (number) {
    case kWrite: write_text((const char*)b, c); return (long)c;
    case kWritev: {
      const uint64_t* parts = (const uint64_t*)b;
      uint64_t written = 0;
      for (uint64_t i = 0; i < c; ++i, written += parts[2 * i - 1]) {
        write_text((const char*)parts[2 * i], parts[2 * i + 1]);
      }
      return (long)written;
    }
    case kBrk:
      if (a >= kHeap && a < kHeapEnd) heap = a;
      return (long)heap;
    case kMmap: {  // never given back: there is plenty
      const uint64_t start = mapped;
      mapped += (b + 4095) & ~4095ul;
      for (uint64_t word = start; word < mapped; word += 8) *(uint64_t*)word = 0;
      return (long)start;
    }
    case kArchPrctl:
      if (a == kSetFs) set_register(kFsBase, b);
      return a == kSetFs || a == kRequestPermission ? 0 : -22;
    case kGetRandom:
      for (uint64_t i = 0; i < b; ++i) ((char*)a)[i] = (char)(37 * i + 11);
      return (long)b;
    case kMunmap:
    case kMprotect:
    case kFutex:
    case kSetRobustList: return 0;
    case kSetTidAddress: return 1;
    case kExitGroup:
      say("exit status ", a);
      power_off();
      return 0;
    default: return -38;
  }
}

static void catch_exceptions(void) {
  static struct {
    uint16_t low, selector, kind, middle;
    uint32_t high, none;
  } gates[32];
  struct __attribute__((packed)) {
    uint16_t limit;
    uint64_t base;
  } table = {sizeof(gates) - 1, (uint64_t)gates};
  for (int i = 0; i < 32; ++i) {
    const uint64_t where = (uint64_t)traps + 32 * (uint64_t)i;
    gates[i].low = (uint16_t)where;
    gates[i].selector = 8;
    gates[i].kind = 0x8E00;
    gates[i].middle = (uint16_t)(where >> 16);
    gates[i].high = (uint32_t)(where >> 32);
  }
  __asm__ volatile("lidt %0" ::"m"(table));
}

void kernel_main(const uint32_t* loader) {
  catch_exceptions();
  set_register(kStar, 8ul << 32);  // a system call stays in ring 0
  set_register(kSyscallEntry, (uint64_t)system_call);

  // The first module, an ELF file, out of the way of where its parts belong.
  const uint32_t* modules = (const uint32_t*)(uint64_t)loader[6];
  char* image = (char*)kImage;
  for (uint32_t i = modules[0]; i < modules[1]; ++i) image[i - modules[0]] = *(char*)(uint64_t)i;
  const uint64_t entry = *(uint64_t*)(image + 24), headers = *(uint64_t*)(image + 32);
  const uint16_t parts = *(uint16_t*)(image + 56);
  uint64_t headers_loaded = 0;
  for (uint16_t part = 0; part < parts; ++part) {
    const char* header = image + headers + 56 * part;
    const uint64_t offset = *(uint64_t*)(header + 8), where = *(uint64_t*)(header + 16);
    const uint64_t in_file = *(uint64_t*)(header + 32), in_memory = *(uint64_t*)(header + 40);
    if (*(uint32_t*)header != 1) continue;
    if (offset == 0) headers_loaded = where + headers;
    for (uint64_t i = 0; i < in_memory; ++i) ((char*)where)[i] = i < in_file ? image[offset + i] : 0;
  }

  // The stack as Linux leaves it: one argument, no environment, and what the C library wants to know.
  static char name[] = "check_ops", random[16] = "not random";
  const uint64_t words[] = {1,  (uint64_t)name,
                            0,  0,  // argc, argv, environment
                            3,  headers_loaded,
                            4,  56,
                            5,  parts,
                            6,  4096,  // program headers, size of a page
                            9,  entry,
                            25, (uint64_t)random,
                            0,  0};
  uint64_t* stack = (uint64_t*)kProgramStack;
  for (uint64_t i = 0; i < sizeof(words) / sizeof(words[0]); ++i) stack[i] = words[i];
  enter(entry, kProgramStack);
}
