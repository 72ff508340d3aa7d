// Verdicts of pictures or raw frames, by a graph of `ssod-edge export --frame`. docs/cpp.md has the commands.
#include "model.hpp"

#include <png.h>
#include <turbojpeg.h>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <fstream>
#include <iostream>
#include <memory>
#include <nlohmann/json.hpp>
#include <stdexcept>
#include <string>

namespace fs = std::filesystem;
using nlohmann::json;

constexpr auto USAGE = "usage: FOLDER GRAPH PICTURE...  or  FOLDER GRAPH --raw HEIGHT WIDTH FILE...  or  "
                       "FOLDER GRAPH --golden FOLDER/golden";

[[noreturn]] void fail(const std::string& message) { throw std::runtime_error(message); }

[[noreturn]] void fail(const fs::path& path, const std::string& reason) { fail("'" + path.string() + "': " + reason); }

std::vector<std::uint8_t> read_file(const fs::path& path) {
    std::error_code error;
    const auto size = fs::file_size(path, error);
    if (error) fail(error.message());
    std::vector<std::uint8_t> bytes(size);
    std::ifstream file(path, std::ios::binary);
    if (!file.read(reinterpret_cast<char*>(bytes.data()), static_cast<std::streamsize>(size))) fail("cannot be read");
    return bytes;
}

json read_json(const fs::path& path) {
    try {
        return json::parse(read_file(path));
    } catch (const std::exception& error) {
        fail(path, error.what());
    }
}

Frame new_frame(std::uint64_t height, std::uint64_t width) {
    if (std::max(height, width) > 65'535 || height * width == 0 || height * width > 100'000'000)
        fail("a frame has 1 to 65535 rows and columns, and at most 100 million pixels");
    return {height, width, std::vector<std::uint8_t>(3 * height * width)};
}

// Of a JPEG that is large enough only every 2nd, 4th or 8th pixel each way is decoded: twice as many are left as the
// network sees. `ssod-edge predict` does the same.
int jpeg_scale(int width, int height, const json& preprocess) {
    if (!preprocess.at("roi").is_null() || preprocess.at("version") < 2) return 1;
    const int shorter = std::min(width, height), longer = std::max(width, height);
    const double crop = preprocess.at("crop_pct"), size = preprocess.at("input_size");
    const std::string fit = preprocess.at("fit");
    const double used = fit == "pad" ? longer : fit == "crop" ? crop * shorter : shorter;
    for (const int scale : {8, 4, 2})
        if (used >= 2 * scale * size && shorter >= scale) return scale;
    return 1;
}

// The EXIF orientation is not applied: a camera's frame has none.
Frame read_jpeg(const std::vector<std::uint8_t>& file, const json& about) {
    const std::unique_ptr<void, int (*)(tjhandle)> decoder(tjInitDecompress(), tjDestroy);
    int width = 0, height = 0, sampling = 0, colours = 0;
    if (tjDecompressHeader3(decoder.get(), file.data(), file.size(), &width, &height, &sampling, &colours) != 0)
        fail(tjGetErrorStr2(decoder.get()));
    const int scale = jpeg_scale(width, height, about.at("preprocess"));
    width = (width + scale - 1) / scale;
    height = (height + scale - 1) / scale;
    Frame frame = new_frame(height, width);
    const int order = about.at("input").at("channels") == "BGR" ? TJPF_BGR : TJPF_RGB;
    // It also fails for a file that was cut off.
    if (tjDecompress2(decoder.get(), file.data(), file.size(), frame.pixels.data(), width, 0, height, order,
                      TJFLAG_ACCURATEDCT | TJFLAG_LIMITSCANS) != 0)
        fail(tjGetErrorStr2(decoder.get()));
    return frame;
}

Frame read_png(const std::vector<std::uint8_t>& file, const json& about) {
    png_image image{};
    image.version = PNG_IMAGE_VERSION;
    const std::unique_ptr<png_image, void (*)(png_image*)> freed(&image, png_image_free);
    if (!png_image_begin_read_from_memory(&image, file.data(), file.size())) fail(image.message);
    if (image.format & PNG_FORMAT_FLAG_LINEAR) fail("16 bits a colour; save it with 8");
    image.format = about.at("input").at("channels") == "BGR" ? PNG_FORMAT_BGRA : PNG_FORMAT_RGBA;
    Frame frame = new_frame(image.height, image.width);
    std::vector<std::uint8_t> pixels(PNG_IMAGE_SIZE(image));
    if (!png_image_finish_read(&image, nullptr, pixels.data(), 0, nullptr)) fail(image.message);
    // The colours as they are stored, without alpha.
    for (std::size_t from = 0, to = 0; to < frame.pixels.size(); from += 4, to += 3)
        std::copy_n(&pixels[from], 3, &frame.pixels[to]);
    return frame;
}

Frame read_picture(const fs::path& path, const json& about) {
    try {
        const auto file = read_file(path);
        if (file.size() > 8 && file[0] == 0xff && file[1] == 0xd8) return read_jpeg(file, about);
        if (file.size() > 8 && png_sig_cmp(file.data(), 0, 8) == 0) return read_png(file, about);
        fail("neither a JPEG nor a PNG");
    } catch (const std::exception& error) {
        fail(path, error.what());
    }
}

Frame read_raw(const fs::path& path, std::uint64_t height, std::uint64_t width) {
    try {
        Frame frame = new_frame(height, width);
        auto file = read_file(path);
        if (file.size() != frame.pixels.size())
            fail("it has " + std::to_string(file.size()) + " bytes; " + std::to_string(height) + " rows of " +
                 std::to_string(width) + " pixels have " + std::to_string(frame.pixels.size()));
        frame.pixels = std::move(file);
        return frame;
    } catch (const std::exception& error) {
        fail(path, error.what());
    }
}

// Where a graph looks at one region alone, a frame must hold it.
Verdict judge(const Model& model, const Frame& frame, const json& about) {
    const json& region = about.at("preprocess").at("roi");  // x, y, width, height
    if (!region.is_null() && (frame.width < region.at(0).get<std::size_t>() + region.at(2).get<std::size_t>() ||
                              frame.height < region.at(1).get<std::size_t>() + region.at(3).get<std::size_t>()))
        fail("the frame is smaller than the region " + region.dump());
    return model(frame);
}

void show(const std::string& name, const Verdict& verdict, const json& about) {
    const auto best = std::max_element(verdict.probs.begin(), verdict.probs.end());
    const std::string label = about.at("classes").at(static_cast<std::size_t>(best - verdict.probs.begin()));
    std::cout << name << '\t' << label << '\t' << *best << '\t' << verdict.score << '\t'
              << (verdict.known ? "known" : "unknown") << std::endl;
}

// Whether every golden frame gets its outputs, and every golden picture has the pixels of its frame.
bool check_golden(const Model& model, const std::string& graph, const fs::path& folder, const json& about) {
    const json golden = read_json(folder / "golden.json"), expected = golden.at("graphs").at(graph);
    const double logits_may = expected.at("tolerance").at("logits");
    const double score_may = expected.at("tolerance").at("ood_score");
    double logits_off = 0, score_off = 0;
    const std::size_t count = golden.at("frames").size();
    std::size_t right = 0;
    for (std::size_t i = 0; i < count; ++i) {
        const json &told = golden.at("frames").at(i), &output = expected.at("outputs").at(i);
        const std::string file = told.at("file"), picture = told.at("picture");
        const Frame frame = read_raw(folder / file, told.at("height"), told.at("width"));
        const Verdict found = judge(model, frame, about);

        const std::vector<double> logits = output.at("logits");
        double off = 0;
        for (std::size_t k = 0; k < logits.size(); ++k) off = std::fmax(off, std::abs(found.logits.at(k) - logits[k]));
        const double score = output.at("ood_score"), shift = std::abs(found.score - score);
        // A score that is as near to the threshold as the tolerance may fall on either side of it.
        const json& threshold = expected.at("threshold");
        const bool near = !threshold.is_null() && std::abs(score - threshold.get<double>()) <= score_may;
        const bool same = off <= logits_may && shift <= score_may && (near || found.known == output.at("known"));
        const bool seen = read_picture(folder / picture, about).pixels == frame.pixels;

        if (!same)
            std::cout << file << ": logits are " << off << " off, the score " << shift << ", and it is "
                      << (found.known ? "known\n" : "unknown\n");
        if (!seen) std::cout << picture << ": its pixels are not those of " << file << '\n';
        logits_off = std::fmax(logits_off, off);
        score_off = std::fmax(score_off, shift);
        right += same && seen;
    }
    std::cout << right << " of " << count << " golden frames are right; logits are up to " << logits_off
              << " off, of which " << logits_may << " are allowed, scores " << score_off << ", of which " << score_may
              << " are\n";
    return right == count;
}

std::uint64_t number(const std::string& text) {
    std::uint64_t value = 0;
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
    if (error != std::errc() || end != text.data() + text.size()) fail("'" + text + "' is not a number of pixels");
    return value;
}

int run(const std::vector<std::string>& words) {
    const bool raw = words.size() > 2 && words[2] == "--raw", golden = words.size() > 2 && words[2] == "--golden";
    if (golden ? words.size() != 4 : words.size() < (raw ? 6 : 3)) {
        std::cerr << USAGE << '\n';
        return 2;
    }
    const fs::path about_file = fs::path(words[0]) / "frame.json";
    const json about = read_json(about_file);
    if (!about.contains("graphs") || !about["graphs"].contains(words[1]))
        fail(about_file, "it names no graph '" + words[1] + "'");
    if (about.at("input").at("channels") == "NV12") fail(about_file, "its graphs take NV12, and this reads RGB and BGR alone");
    const std::string graph = about["graphs"][words[1]].at("main_file");
    const Model model = open_model(fs::path(words[0]) / graph);

    if (golden) return check_golden(model, words[1], words[3], about) ? 0 : 1;
    for (std::size_t i = raw ? 5 : 2; i < words.size(); ++i) {
        const fs::path file = words[i];
        const Frame frame = raw ? read_raw(file, number(words[3]), number(words[4])) : read_picture(file, about);
        show(words[i], judge(model, frame, about), about);
    }
    return 0;
}

int main(int count, char** words) {
    try {
        return run({words + 1, words + count});
    } catch (const std::exception& error) {
        std::string line = error.what();  // an engine's may be several
        std::replace(line.begin(), line.end(), '\n', ' ');
        std::cerr << "error: " << line << '\n';
        return 1;
    }
}
