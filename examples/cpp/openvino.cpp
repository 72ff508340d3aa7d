// A frame graph on OpenVINO.
#include "model.hpp"

#include <memory>
#include <openvino/openvino.hpp>
#include <stdexcept>

Model open_model(const std::filesystem::path& graph) {
    const auto core = std::make_shared<ov::Core>();
    const auto model = core->read_model(graph.string());
    if (model->inputs().size() != 1 || model->input().get_names().count("frame") == 0 ||
        model->input().get_element_type() != ov::element::u8 ||
        !model->input().get_partial_shape().compatible(ov::PartialShape{-1, -1, 3}))
        throw std::runtime_error("'" + graph.string() + "' is not of `ssod-edge export --frame`: it takes no frame");

    // Without the first hint some processors compute in bfloat16, which is too coarse for pixels.
    auto request = core->compile_model(model, "CPU", ov::hint::inference_precision(ov::element::f32),
                                       ov::hint::performance_mode(ov::hint::PerformanceMode::LATENCY))
                       .create_infer_request();

    return [core, request](const Frame& frame) mutable -> Verdict {
        const ov::Shape shape{frame.height, frame.width, 3};
        request.set_tensor("frame", ov::Tensor(ov::element::u8, shape, const_cast<std::uint8_t*>(frame.pixels.data())));
        request.infer();

        const auto floats = [&](const char* name) {
            const ov::Tensor tensor = request.get_tensor(name);
            const float* first = tensor.data<float>();
            return std::vector<float>(first, first + tensor.get_size());
        };
        return {floats("logits"), floats("probs"), floats("ood_score")[0], request.get_tensor("known").data<bool>()[0]};
    };
}
