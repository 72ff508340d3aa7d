// A frame graph on ONNX Runtime.
#include "model.hpp"

#include <onnxruntime_cxx_api.h>

#include <array>
#include <cstdlib>
#include <memory>
#include <stdexcept>

Model open_model(const std::filesystem::path& graph) {
    setenv("ORT_DISABLE_TELEMETRY", "1", 0);  // from 1.32 on it reports its use, and writes an id into the home folder
    const auto env = std::make_shared<Ort::Env>(ORT_LOGGING_LEVEL_ERROR);
    const auto session = std::make_shared<Ort::Session>(*env, graph.c_str(), Ort::SessionOptions());
    const auto takes_frame = [&] {
        if (session->GetInputCount() != 1) return false;
        const auto name = session->GetInputNameAllocated(0, Ort::AllocatorWithDefaultOptions());
        const auto type = session->GetInputTypeInfo(0);
        const auto tensor = type.GetTensorTypeAndShapeInfo();
        return std::string(name.get()) == "frame" && tensor.GetShape() == std::vector<std::int64_t>{-1, -1, 3} &&
               tensor.GetElementType() == ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8;
    };
    if (!takes_frame())
        throw std::runtime_error("'" + graph.string() + "' is not of `ssod-edge export --frame`: it takes no frame");

    return [env, session](const Frame& frame) -> Verdict {
        const std::array<std::int64_t, 3> shape{static_cast<std::int64_t>(frame.height),
                                                static_cast<std::int64_t>(frame.width), 3};
        const auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
        const Ort::Value input = Ort::Value::CreateTensor<std::uint8_t>(
            memory, const_cast<std::uint8_t*>(frame.pixels.data()), frame.pixels.size(), shape.data(), shape.size());
        const char* name = "frame";
        const std::array outputs{"logits", "probs", "ood_score", "known"};
        const auto found = session->Run(Ort::RunOptions(), &name, &input, 1, outputs.data(), outputs.size());

        const auto floats = [](const Ort::Value& value) {
            const float* first = value.GetTensorData<float>();
            return std::vector<float>(first, first + value.GetTensorTypeAndShapeInfo().GetElementCount());
        };
        return {floats(found[0]), floats(found[1]), floats(found[2])[0], found[3].GetTensorData<bool>()[0]};
    };
}
