// A ggml backend "SIM" for tests: devices whose memory the host cannot touch, computed with ggml's own CPU backend.
//
// What a device hands out as an address is not one of this process: it is AWAY from where the bytes are, in a part of the address space
// that no process can map, so that a host that reads or writes there by itself is killed at once. Before a graph is computed all addresses
// in it are turned into real ones, after it back; a tensor of the host in a graph makes the computation fail.
//
// Environment: SIM_MEMORY, bytes of each device (else 1 GiB); SIM_WITHOUT, names of operations it has no kernel for, separated by commas,
// "FLASH_ATTN_EXT:each" for flash attention with a mask for every head; SIM_NAME, what it is called, for tests of what looks for another;
// SIM_FAILS, set while no graph can be computed.
//
// The declarations are those of ggml 0.25.3 (llama.cpp as vendored by llama-cpp-python 0.3.36, MIT licence, Copyright (c) 2023-2026 The
// ggml authors): ggml/include/ggml.h, ggml/include/ggml-backend.h, ggml/src/ggml-backend-impl.h. Only what is used here is named;
// what is not is a plain pointer in its place.

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <set>
#include <string>

extern "C" {

typedef struct ggml_backend_buffer_type * ggml_backend_buffer_type_t;
typedef struct ggml_backend_buffer * ggml_backend_buffer_t;
typedef struct ggml_backend * ggml_backend_t;
typedef struct ggml_backend_device * ggml_backend_dev_t;
typedef struct ggml_backend_reg * ggml_backend_reg_t;
struct ggml_cgraph;

// ggml.h
struct ggml_tensor {
    int type;
    ggml_backend_buffer_t buffer;
    int64_t ne[4];
    size_t nb[4];
    int op;
    int32_t op_params[16];
    int32_t flags;
    ggml_tensor * src[10];
    ggml_tensor * view_src;
    size_t view_offs;
    void * data;
    char name[64];
    void * extra;
    char padding[8];
};
const char * ggml_op_name(int op);
size_t ggml_nbytes(const ggml_tensor * tensor);
size_t ggml_row_size(int type, int64_t ne);
bool ggml_is_quantized(int type);
ggml_tensor * ggml_graph_node(ggml_cgraph * graph, int i);
int ggml_graph_n_nodes(ggml_cgraph * graph);

// ggml-backend.h
enum { STATUS_FAILED = -1, STATUS_SUCCESS = 0 };
enum { DEVICE_TYPE_GPU = 1 };
struct ggml_backend_dev_caps {
    bool async, host_buffer, buffer_from_host_ptr, events, mmap_support;
};
struct ggml_backend_dev_props {
    const char * name;
    const char * description;
    size_t memory_free, memory_total;
    int type;
    const char * device_id;
    ggml_backend_dev_caps caps;
};
ggml_backend_t ggml_backend_cpu_init(void);
void ggml_backend_cpu_set_n_threads(ggml_backend_t backend, int n_threads);
int ggml_backend_graph_compute(ggml_backend_t backend, ggml_cgraph * graph);
void ggml_backend_free(ggml_backend_t backend);

// ggml-backend-impl.h
struct ggml_backend_buffer_type_i {
    const char * (*get_name)(ggml_backend_buffer_type_t);
    ggml_backend_buffer_t (*alloc_buffer)(ggml_backend_buffer_type_t, size_t);
    size_t (*get_alignment)(ggml_backend_buffer_type_t);
    size_t (*get_max_size)(ggml_backend_buffer_type_t);
    size_t (*get_alloc_size)(ggml_backend_buffer_type_t, const ggml_tensor *);
    bool (*is_host)(ggml_backend_buffer_type_t);
};
struct ggml_backend_buffer_type {
    ggml_backend_buffer_type_i iface;
    ggml_backend_dev_t device;
    void * context;
};
struct ggml_backend_buffer_i {
    void (*free_buffer)(ggml_backend_buffer_t);
    void * (*get_base)(ggml_backend_buffer_t);
    int (*init_tensor)(ggml_backend_buffer_t, ggml_tensor *);
    void (*memset_tensor)(ggml_backend_buffer_t, ggml_tensor *, uint8_t, size_t, size_t);
    void (*set_tensor)(ggml_backend_buffer_t, ggml_tensor *, const void *, size_t, size_t);
    void (*get_tensor)(ggml_backend_buffer_t, const ggml_tensor *, void *, size_t, size_t);
    void * set_tensor_2d;
    void * get_tensor_2d;
    bool (*cpy_tensor)(ggml_backend_buffer_t, const ggml_tensor *, ggml_tensor *);
    void (*clear)(ggml_backend_buffer_t, uint8_t);
    void (*reset)(ggml_backend_buffer_t);
};
ggml_backend_buffer_t ggml_backend_buffer_init(ggml_backend_buffer_type_t buft, ggml_backend_buffer_i iface, void * context, size_t size);
struct ggml_backend_buffer {
    ggml_backend_buffer_i iface;
    ggml_backend_buffer_type_t buft;
    void * context;
    size_t size;
    int usage;
};
struct ggml_backend_i {
    const char * (*get_name)(ggml_backend_t);
    void (*free)(ggml_backend_t);
    void * set_tensor_async;
    void * get_tensor_async;
    void * set_tensor_2d_async;
    void * get_tensor_2d_async;
    void * cpy_tensor_async;
    void (*synchronize)(ggml_backend_t);
    void * graph_plan_create;
    void * graph_plan_free;
    void * graph_plan_update;
    void * graph_plan_compute;
    int (*graph_compute)(ggml_backend_t, ggml_cgraph *);
    void * event_record;
    void * event_wait;
    void * graph_optimize;
};
struct ggml_backend {
    void * guid;
    ggml_backend_i iface;
    ggml_backend_dev_t device;
    void * context;
};
struct ggml_backend_device_i {
    const char * (*get_name)(ggml_backend_dev_t);
    const char * (*get_description)(ggml_backend_dev_t);
    void (*get_memory)(ggml_backend_dev_t, size_t *, size_t *);
    int (*get_type)(ggml_backend_dev_t);
    void (*get_props)(ggml_backend_dev_t, ggml_backend_dev_props *);
    ggml_backend_t (*init_backend)(ggml_backend_dev_t, const char *);
    ggml_backend_buffer_type_t (*get_buffer_type)(ggml_backend_dev_t);
    void * get_host_buffer_type;
    void * buffer_from_host_ptr;
    bool (*supports_op)(ggml_backend_dev_t, const ggml_tensor *);
    bool (*supports_buft)(ggml_backend_dev_t, ggml_backend_buffer_type_t);
    void * offload_op;
    void * event_new;
    void * event_free;
    void * event_synchronize;
};
struct ggml_backend_device {
    ggml_backend_device_i iface;
    ggml_backend_reg_t reg;
    void * context;
};
struct ggml_backend_reg_i {
    const char * (*get_name)(ggml_backend_reg_t);
    size_t (*get_device_count)(ggml_backend_reg_t);
    ggml_backend_dev_t (*get_device)(ggml_backend_reg_t, size_t);
    void * (*get_proc_address)(ggml_backend_reg_t, const char *);
};
struct ggml_backend_reg {
    int api_version;
    ggml_backend_reg_i iface;
    void * context;
};

}  // extern "C"

namespace {

const int API_VERSION = 2;
const size_t ALIGNMENT = 256;        // CUDA's are 128, CANN's 32
const size_t ROW_PADDING = 512;      // CUDA rounds rows of quantised weights up to so many elements (MATRIX_ROW_PADDING)
const uintptr_t AWAY = 1ull << 62;   // not canonical on x86-64 and AArch64: no pointer there can be followed
const int DEVICES = 2;

struct Place {
    const char * name;
    const char * id;
    size_t held;
};
Place places[DEVICES] = {{"SIM0", "0000:01:00.0", 0}, {"SIM1", "0000:02:00.0", 0}};

size_t memory_of_a_device() {
    const char * set = getenv("SIM_MEMORY");
    return set ? strtoull(set, nullptr, 10) : size_t(1) << 30;
}

Place & place(ggml_backend_dev_t device) { return *static_cast<Place *>(device->context); }

template <typename T> T * real(T * address) { return reinterpret_cast<T *>(reinterpret_cast<uintptr_t>(address) - AWAY); }

// ---- buffers: the context is the real address

void buffer_free(ggml_backend_buffer_t buffer) {
    place(buffer->buft->device).held -= buffer->size;
    free(buffer->context);
}

void * buffer_base(ggml_backend_buffer_t buffer) { return reinterpret_cast<void *>(reinterpret_cast<uintptr_t>(buffer->context) + AWAY); }

void tensor_memset(ggml_backend_buffer_t, ggml_tensor * tensor, uint8_t value, size_t offset, size_t size) {
    memset(real(static_cast<char *>(tensor->data)) + offset, value, size);
}

void tensor_set(ggml_backend_buffer_t, ggml_tensor * tensor, const void * data, size_t offset, size_t size) {
    memcpy(real(static_cast<char *>(tensor->data)) + offset, data, size);
}

void tensor_get(ggml_backend_buffer_t, const ggml_tensor * tensor, void * data, size_t offset, size_t size) {
    memcpy(data, real(static_cast<char *>(tensor->data)) + offset, size);
}

void buffer_clear(ggml_backend_buffer_t buffer, uint8_t value) { memset(buffer->context, value, buffer->size); }

const char * type_name(ggml_backend_buffer_type_t type) { return place(type->device).name; }

ggml_backend_buffer_t type_alloc(ggml_backend_buffer_type_t type, size_t size) {
    Place & here = place(type->device);
    if (here.held + size > memory_of_a_device()) return nullptr;
    void * memory = nullptr;
    if (posix_memalign(&memory, ALIGNMENT, size)) return nullptr;
    memset(memory, 0xFF, size);  // NaN in every float type: what relies on zeroes that nobody wrote is found
    here.held += size;
    ggml_backend_buffer_i iface = {};
    iface.free_buffer = buffer_free;
    iface.get_base = buffer_base;
    iface.memset_tensor = tensor_memset;
    iface.set_tensor = tensor_set;
    iface.get_tensor = tensor_get;
    iface.clear = buffer_clear;
    return ggml_backend_buffer_init(type, iface, memory, size);
}

size_t type_alignment(ggml_backend_buffer_type_t) { return ALIGNMENT; }

size_t type_alloc_size(ggml_backend_buffer_type_t, const ggml_tensor * tensor) {
    size_t size = ggml_nbytes(tensor);
    if (ggml_is_quantized(tensor->type) && tensor->ne[0] % ROW_PADDING) {
        size += ggml_row_size(tensor->type, ROW_PADDING - tensor->ne[0] % ROW_PADDING);
    }
    return size;
}

bool type_is_host(ggml_backend_buffer_type_t) { return false; }

extern ggml_backend_device devices[DEVICES];
#define BUFFER_TYPE(i) {{type_name, type_alloc, type_alignment, nullptr, type_alloc_size, type_is_host}, &devices[i], nullptr}
ggml_backend_buffer_type types[DEVICES] = {BUFFER_TYPE(0), BUFFER_TYPE(1)};

// ---- the backend: its context is ggml's CPU backend

const char * backend_name(ggml_backend_t backend) { return place(backend->device).name; }

void backend_free(ggml_backend_t backend) {
    ggml_backend_free(static_cast<ggml_backend_t>(backend->context));
    delete backend;
}

bool ours(ggml_backend_t backend, const ggml_tensor * tensor) {
    const ggml_tensor * owner = tensor->view_src ? tensor->view_src : tensor;
    const ggml_backend_buffer_t buffer = tensor->buffer ? tensor->buffer : owner->buffer;
    return buffer && buffer->buft->device == backend->device;
}

int backend_compute(ggml_backend_t backend, ggml_cgraph * graph) {
    if (getenv("SIM_FAILS")) return STATUS_FAILED;
    std::set<ggml_tensor *> tensors;
    for (int i = 0; i < ggml_graph_n_nodes(graph); i++) {
        ggml_tensor * node = ggml_graph_node(graph, i);
        tensors.insert(node);
        for (ggml_tensor * source : node->src) {
            if (source) tensors.insert(source);
        }
    }
    for (ggml_tensor * tensor : tensors) {
        if (!ours(backend, tensor)) {
            fprintf(stderr, "SIM: tensor %s (%s) is not in the memory of %s\n", tensor->name, ggml_op_name(tensor->op), backend_name(backend));
            return STATUS_FAILED;
        }
    }
    for (ggml_tensor * tensor : tensors) tensor->data = real(static_cast<char *>(tensor->data));
    const int status = ggml_backend_graph_compute(static_cast<ggml_backend_t>(backend->context), graph);
    for (ggml_tensor * tensor : tensors) tensor->data = static_cast<char *>(tensor->data) + AWAY;
    return status;
}

// ---- devices

const char * device_name(ggml_backend_dev_t device) { return place(device).name; }
const char * device_description(ggml_backend_dev_t) { return "a simulated accelerator"; }

void device_memory(ggml_backend_dev_t device, size_t * free_, size_t * total) {
    *total = memory_of_a_device();
    *free_ = *total - place(device).held;
}

int device_type(ggml_backend_dev_t) { return DEVICE_TYPE_GPU; }

void device_props(ggml_backend_dev_t device, ggml_backend_dev_props * props) {
    *props = {};
    props->name = device_name(device);
    props->description = device_description(device);
    device_memory(device, &props->memory_free, &props->memory_total);
    props->type = DEVICE_TYPE_GPU;
    props->device_id = place(device).id;
}

ggml_backend_t device_init(ggml_backend_dev_t device, const char *) {
    ggml_backend_t cpu = ggml_backend_cpu_init();
    ggml_backend_cpu_set_n_threads(cpu, 1);
    static char guid[16] = "edge-rt SIM";
    ggml_backend_i iface = {};
    iface.get_name = backend_name;
    iface.free = backend_free;
    iface.graph_compute = backend_compute;
    return new ggml_backend{guid, iface, device, cpu};
}

ggml_backend_buffer_type_t device_buffer_type(ggml_backend_dev_t device) { return &types[device - devices]; }

bool device_supports_op(ggml_backend_dev_t, const ggml_tensor * op) {
    const char * without = getenv("SIM_WITHOUT");
    if (!without) return true;
    const std::string listed = std::string(",") + without + ",", name = ggml_op_name(op->op);
    const bool each = name == "FLASH_ATTN_EXT" && op->src[3] && op->src[3]->ne[2] > 1;
    return listed.find("," + name + ",") == std::string::npos && !(each && listed.find("," + name + ":each,") != std::string::npos);
}

bool device_supports_buft(ggml_backend_dev_t device, ggml_backend_buffer_type_t type) { return type->device == device; }

const char * registry_name(ggml_backend_reg_t) {
    const char * set = getenv("SIM_NAME");
    return set ? set : "SIM";
}
size_t registry_count(ggml_backend_reg_t) { return DEVICES; }
ggml_backend_dev_t registry_device(ggml_backend_reg_t, size_t index) { return &devices[index]; }
void * registry_function(ggml_backend_reg_t, const char *) { return nullptr; }

ggml_backend_reg registry = {API_VERSION, {registry_name, registry_count, registry_device, registry_function}, nullptr};

#define DEVICE(i)                                                                                                                          \
    {{device_name, device_description, device_memory, device_type, device_props, device_init, device_buffer_type, nullptr, nullptr,        \
      device_supports_op, device_supports_buft, nullptr, nullptr, nullptr, nullptr},                                                       \
     &registry, &places[i]}
ggml_backend_device devices[DEVICES] = {DEVICE(0), DEVICE(1)};

}  // namespace

extern "C" __attribute__((visibility("default"))) ggml_backend_reg_t ggml_backend_init(void) { return &registry; }
