// An NVTX injection library: writes every range of every domain to the file RLIR_NVTX_LOG.
// Loaded by NVTX when NVTX_INJECTION64_PATH names it. Layouts are those of NVTX 3 (nvToolsExt.h,
// nvtxTypes.h), repeated here so that the test needs no header.
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct {
  uint16_t version, size;
  uint32_t category;
  int32_t color_type;
  uint32_t color;
  int32_t payload_type, reserved;
  union {
    uint64_t u;
    int64_t i;
    double d;
  } payload;
  int32_t message_type;
  const char* message;  // ASCII, or a handle of ours, which is the string itself
} Attributes;

enum { kCallbacksTable = 1, kCore2 = 5 };
enum { kPushEx = 4, kPop = 5, kRegisterString = 10, kCreateDomain = 12 };

typedef struct {
  size_t size;
  int (*module_functions)(int module, void*** table, unsigned* count);
} Callbacks;

static FILE* log_file(void) {
  static FILE* file;
  if (file == NULL) file = fopen(getenv("RLIR_NVTX_LOG"), "w");
  return file;
}

static void* create_domain(const char* name) { return strdup(name); }
static void* register_string(void* domain, const char* text) {
  (void)domain;
  return strdup(text);
}

static int push(void* domain, const Attributes* a) {
  fprintf(log_file(), "push %s %s %d %lld\n", (const char*)domain, a->message, a->payload_type,
          (long long)a->payload.i);
  fflush(log_file());
  return 0;
}

static int pop(void* domain) {
  fprintf(log_file(), "pop %s\n", (const char*)domain);
  fflush(log_file());
  return 0;
}

__attribute__((visibility("default"))) int InitializeInjectionNvtx2(
    const void* (*export_table)(uint32_t id)) {
  const Callbacks* callbacks = export_table(kCallbacksTable);
  void** functions[64];
  void*** table = functions;
  unsigned count = 0;
  if (callbacks == NULL || log_file() == NULL) return 0;
  if (!callbacks->module_functions(kCore2, (void***)&table, &count) || count <= kCreateDomain) {
    return 0;
  }
  *table[kPushEx] = (void*)push;
  *table[kPop] = (void*)pop;
  *table[kRegisterString] = (void*)register_string;
  *table[kCreateDomain] = (void*)create_domain;
  return 1;
}
