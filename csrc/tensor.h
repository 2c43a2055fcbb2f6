// Tensors and the arguments of a call, through torch's stable C interface alone: all that the glue needs of torch.
//
// torch/csrc/stable has classes for both, but its conversion of a string argument leaks the string, and its tensor asks
// the library anew for every size.
#pragma once
#include <torch/csrc/stable/library.h>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <algorithm>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace quantlib {

using Sizes = std::vector<int64_t>;
using SizesView = torch::headeronly::IntHeaderOnlyArrayRef;  // sizes that something else holds

inline void check_torch(AOTITorchError status) {
  if (status != AOTI_TORCH_SUCCESS) throw std::runtime_error("quantlib: a call of torch failed");
}

// Large memory that nobody has touched: in pages of 2 MiB, because to fault in small ones costs more than most ops.
inline void in_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] int64_t bytes) {
#ifdef MADV_HUGEPAGE
  constexpr int64_t page = int64_t(2) << 20;
  const int64_t first = (int64_t(data) + page - 1) / page * page, end = (int64_t(data) + bytes) / page * page;
  if (first < end) madvise(reinterpret_cast<void*>(first), size_t(end - first), MADV_HUGEPAGE);  // as good without
#endif
}

// The product of sizes: 0 where one is, and the largest number where an int64 does not hold it.
inline int64_t product(const int64_t* first, const int64_t* end) {
  if (std::find(first, end, 0) != end) return 0;
  int64_t n = 1;
  for (; first != end; ++first)
    if (__builtin_mul_overflow(n, *first, &n)) return INT64_MAX;
  return n;
}

struct Device {
  int32_t type, index;
  bool operator==(Device other) const { return type == other.type && index == other.index; }
};

// The argument of an op that a tensor is.
struct Name {
  const char* op = "";
  const char* argument = "";
};

// Says that torch has no memory for a tensor: check.h.
[[noreturn]] void fail_to_allocate(Name name, SizesView sizes, int32_t dtype, Device device);

constexpr int32_t kNoDtype = -1;  // of what torch passes for None: every check refuses it

// Owns one reference to a torch tensor, and knows what never changes about it.
class Tensor {
 public:
  explicit Tensor(AtenTensorHandle handle, Name name = {}) : handle_(handle), name_(name) {
    bool defined;
    check_torch(aoti_torch_is_defined(handle, &defined));
    if (!defined) return;
    int64_t *sizes, dim;
    check_torch(aoti_torch_get_dim(handle, &dim));
    check_torch(aoti_torch_get_sizes(handle, &sizes));
    sizes_ = SizesView(sizes, size_t(dim));
    check_torch(aoti_torch_get_dtype(handle, &dtype_));
    check_torch(aoti_torch_get_device_type(handle, &device_.type));
    check_torch(aoti_torch_get_device_index(handle, &device_.index));
  }
  static Tensor empty(SizesView sizes, int32_t dtype, Device device, Name name) {
    Sizes strides(sizes.size(), 1);
    for (size_t d = sizes.size(); d-- > 1;)
      if (__builtin_mul_overflow(strides[d], std::max<int64_t>(sizes[d], 1), &strides[d - 1]))
        strides[d - 1] = INT64_MAX;
    AtenTensorHandle handle;
    if (aoti_torch_empty_strided(int64_t(sizes.size()), sizes.data(), strides.data(), dtype, device.type, device.index,
                                 &handle) != AOTI_TORCH_SUCCESS)
      fail_to_allocate(name, sizes, dtype, device);
    Tensor made(handle, name);
    if (device.type == aoti_torch_device_type_cpu()) in_huge_pages(made.data(), made.nbytes());
    return made;
  }
  // Memory that something else owns, as a matrix.
  static Tensor view(void* data, const int64_t (&sizes)[2], const int64_t (&strides)[2], int32_t dtype, Device device) {
    AtenTensorHandle handle;
    check_torch(
        aoti_torch_create_tensor_from_blob(data, 2, sizes, strides, 0, dtype, device.type, device.index, &handle));
    return Tensor(handle);
  }
  Tensor(Tensor&& other) noexcept
      : handle_(std::exchange(other.handle_, nullptr)),
        name_(other.name_),
        sizes_(other.sizes_),
        dtype_(other.dtype_),
        device_(other.device_) {}
  Tensor& operator=(Tensor&& other) noexcept {
    std::swap(handle_, other.handle_);
    name_ = other.name_;
    std::swap(sizes_, other.sizes_);
    std::swap(dtype_, other.dtype_);
    std::swap(device_, other.device_);
    return *this;
  }
  ~Tensor() {
    if (handle_) aoti_torch_delete_tensor_object(handle_);
  }

  SizesView sizes() const { return sizes_; }
  int32_t dtype() const { return dtype_; }
  Device device() const { return device_; }
  SizesView strides() const {
    int64_t* strides;
    check_torch(aoti_torch_get_strides(handle_, &strides));
    return SizesView(strides, sizes_.size());
  }
  int64_t numel() const { return product(sizes_.begin(), sizes_.end()); }
  int64_t nbytes() const { return numel() * int64_t(aoti_torch_dtype_element_size(dtype_)); }  // of what exists
  bool is_contiguous() const {
    bool result;
    check_torch(aoti_torch_is_contiguous(handle_, &result));
    return result;
  }
  void* data() const {
    void* data;
    check_torch(aoti_torch_get_data_ptr(handle_, &data));
    return data;
  }
  void copy_from(const Tensor& other) const { check_torch(aoti_torch_copy_(handle_, other.handle_, 0)); }
  void fill_with_zeros() const { check_torch(aoti_torch_zero_(handle_)); }
  // Become a contiguous copy of itself, if it is not contiguous.
  void make_contiguous() {
    if (is_contiguous()) return;
    Tensor copy = empty(sizes_, dtype_, device_, name_);
    copy.copy_from(*this);
    *this = std::move(copy);
  }
  // The first byte, and the one after the last.
  std::pair<const char*, const char*> memory() const {
    const auto* first = static_cast<const char*>(data());
    if (!numel()) return {first, first};
    const SizesView strides = this->strides();
    int64_t last = 0;
    for (size_t d = 0; d < sizes_.size(); ++d) last += strides[d] * (sizes_[d] - 1);
    return {first, first + (last + 1) * int64_t(aoti_torch_dtype_element_size(dtype_))};
  }
  // True if two tensors may share a byte.
  bool overlaps(const Tensor& other) const {
    const auto [a, a_end] = memory();
    const auto [b, b_end] = other.memory();
    return a < b_end && b < a_end;
  }
  // True if two elements may share a byte.
  bool overlaps_itself() const {
    if (is_contiguous() || !numel()) return false;
    const SizesView strides = this->strides();
    std::vector<std::pair<int64_t, int64_t>> axes;
    for (size_t d = 0; d < sizes_.size(); ++d) axes.emplace_back(strides[d], sizes_[d]);
    std::sort(axes.begin(), axes.end());
    int64_t span = 0;  // what the axes of smaller strides reach
    for (const auto& [stride, size] : axes) {
      if (size > 1 && stride <= span) return true;
      span += stride * (size - 1);
    }
    return false;
  }
  // One more reference: the caller's to delete.
  AtenTensorHandle reference() const {
    AtenTensorHandle handle;
    check_torch(aoti_torch_new_tensor_handle(handle_, &handle));
    return handle;
  }
  // The reference itself: the caller's to delete.
  AtenTensorHandle release() { return std::exchange(handle_, nullptr); }

 private:
  AtenTensorHandle handle_;
  Name name_;
  SizesView sizes_;
  int32_t dtype_ = kNoDtype;
  Device device_ = {-1, -1};
};

// The arguments of a call, taken in the order of the schema: each belongs to us from then on.
class Arguments {
 public:
  // `results` is how many the op returns: none in an out form, which is given them.
  Arguments(const char* op, const StableIValue* stack, uint64_t results)
      : op_(op), next_(stack), has_outs_(results == 0) {}

  Tensor tensor(const char* argument) { return Tensor(take<AtenTensorHandle>(), {op_, argument}); }
  bool flag() { return take<bool>(); }
  int64_t size() { return take<int64_t>(); }
  double number() { return take<double>(); }
  std::string text() { return text_of(take<StringHandle>()); }
  Sizes sizes() { return sizes_of(take<StableListHandle>()); }
  std::optional<Tensor> optional_tensor(const char* argument) {
    return optional<Tensor>([&](StableIValue value) {
      return Tensor(torch::stable::detail::to<AtenTensorHandle>(value), {op_, argument});
    });
  }
  std::optional<std::string> optional_text() {
    return optional<std::string>(
        [](StableIValue value) { return text_of(torch::stable::detail::to<StringHandle>(value)); });
  }
  std::optional<Sizes> optional_sizes() {
    return optional<Sizes>(
        [](StableIValue value) { return sizes_of(torch::stable::detail::to<StableListHandle>(value)); });
  }
  std::optional<int32_t> optional_dtype() { return optional<int32_t>(torch::stable::detail::to<int32_t>); }
  bool has_outs() const { return has_outs_; }
  // The tensor for a result, in an out form.
  std::optional<Tensor> out(const char* argument) {
    return has_outs_ ? std::optional<Tensor>(tensor(argument)) : std::nullopt;
  }
  std::optional<int64_t> optional_size() { return optional<int64_t>(torch::stable::detail::to<int64_t>); }

 private:
  const char* op_;
  const StableIValue* next_;
  bool has_outs_;

  static Sizes sizes_of(StableListHandle handle) {
    size_t length;
    check_torch(torch_list_size(handle, &length));
    Sizes result(length);
    for (size_t i = 0; i < length; ++i) {
      StableIValue item;
      check_torch(torch_list_get_item(handle, i, &item));
      result[i] = torch::stable::detail::to<int64_t>(item);
    }
    check_torch(torch_delete_list(handle));
    return result;
  }
  static std::string text_of(StringHandle handle) {
    const char* data;
    size_t length;
    check_torch(torch_string_c_str(handle, &data));
    check_torch(torch_string_length(handle, &length));
    std::string result(data, length);
    check_torch(torch_delete_string(handle));
    return result;
  }
  template <class T>
  T take() {
    return torch::stable::detail::to<T>(*next_++);
  }
  template <class T, class Make>
  std::optional<T> optional(Make make) {
    const auto* boxed = take<StableIValue*>();
    if (!boxed) return std::nullopt;
    const StableIValue value = *boxed;
    delete boxed;
    return make(value);
  }
};

}  // namespace quantlib
