#pragma once
#include <atomic>
#include <memory>

#include "storage/block/file.hpp"

namespace ring3::storage {

/// Which accesses fail: a trouble that tests make, shared by the files of a chain.
struct Faults {
  u64 every = 0;                  ///< the every-th access from the moment it is armed, and each every-th after it
  int code = EIO;                 ///< EIO: any access; ENOSPC: those that may need room
  std::atomic<bool> armed{false};
  std::atomic<u64> accesses{0};

  bool strikes(bool needs_room) {
    if (every == 0 || !armed.load(std::memory_order_relaxed) || (code == ENOSPC && !needs_room)) return false;
    return (accesses.fetch_add(1, std::memory_order_relaxed) + 1) % every == 0;
  }
};

/// A file whose accesses fail now and then, in front of a real one. A write that fails is not made. As with every
/// File, a sync that failed is not followed by one that succeeds.
class FaultyFile final : public File {
 public:
  FaultyFile(std::unique_ptr<File> inner, std::shared_ptr<Faults> faults) : inner_(std::move(inner)), faults_(std::move(faults)) {}

  using File::read;
  using File::write;
  int read(u64 offset, std::span<const iovec> buffers) override {
    return faults_->strikes(false) ? -faults_->code : inner_->read(offset, buffers);
  }
  int write(u64 offset, std::span<const iovec> buffers) override {
    return faults_->strikes(true) ? -faults_->code : inner_->write(offset, buffers);
  }
  int sync() override {
    if (sync_failed_.load() || faults_->strikes(false)) {
      sync_failed_.store(true);
      return -faults_->code;
    }
    return inner_->sync();
  }
  int zero(u64 offset, u64 length, bool deallocate) override {
    return faults_->strikes(true) ? -faults_->code : inner_->zero(offset, length, deallocate);
  }
  int reserve(u64 offset, u64 length) override { return faults_->strikes(true) ? -faults_->code : inner_->reserve(offset, length); }
  int truncate(u64 size) override { return faults_->strikes(true) ? -faults_->code : inner_->truncate(size); }
  i64 size() override { return inner_->size(); }
  Segment segment(u64 offset) override { return inner_->segment(offset); }
  bool grows_with_zeroes() const override { return inner_->grows_with_zeroes(); }
  // No direct_fd(): every access comes through here.

 private:
  std::unique_ptr<File> inner_;
  std::shared_ptr<Faults> faults_;
  std::atomic<bool> sync_failed_{false};
};

}  // namespace ring3::storage
