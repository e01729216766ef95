// Messages to the logger of the application, found through what TensorRT hands to setLoggerFinder.
#pragma once

#include <exception>

namespace edgeprune::plugins {

void set_logger_finder(void* finder) noexcept;

// Go to standard error where no logger is to be had: without a reason a refused plugin cannot be understood.
void log_error(char const* message) noexcept;
void log_warning(char const* message) noexcept;

// Runs `body`; what it throws is logged and answered by `otherwise`, because TensorRT's calls must not throw.
template <class Result, class Body>
Result guarded(Result otherwise, Body const& body) noexcept {
  try {
    return body();
  } catch (std::exception const& error) {
    log_error(error.what());
  } catch (...) {
    log_error("an unknown error");
  }
  return otherwise;
}

}  // namespace edgeprune::plugins
