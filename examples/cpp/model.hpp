// What openvino.cpp and onnxruntime.cpp have in common: a frame goes in, a verdict comes out.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <vector>

// Pixels row by row, three bytes each, in the order that the graph was exported with (`--channels RGB` or BGR).
struct Frame {
    std::size_t height, width;
    std::vector<std::uint8_t> pixels;
};

struct Verdict {
    std::vector<float> logits, probs;  // of each class
    float score;                       // larger: less like anything that was taught
    bool known;                        // the score is at most the threshold
};

// Not from two threads at a time.
using Model = std::function<Verdict(const Frame&)>;

// Opens a graph that `ssod-edge export --frame` wrote. Throws std::exception with the reason where it cannot.
Model open_model(const std::filesystem::path& graph);
