// Runs the graph `forward` of an artifact on token ids and prints the logits, with libtorch and without Python.
//
//     client model.pt2 5,6,7 8,9,10
//
// Each argument after the file is a row of token ids; the output has one number on each line, row by row. The weights
// are read once from the file, by its index `extra/weights.tsv`, and are used where they were read. It is linked with
// torch, torch_cpu and c10: what Inductor has compiled may ask for any of them.

#include <ATen/ATen.h>
#include <c10/core/InferenceMode.h>
#include <caffe2/serialize/inline_container.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <cstdio>
#include <cstdlib>
#include <iostream>
#include <sstream>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

const std::string GRAPH = "forward";

std::vector<std::string> split(const std::string& text, char separator) {
    std::vector<std::string> parts;
    std::istringstream stream(text);
    for (std::string part; std::getline(stream, part, separator);) parts.push_back(part);
    return parts;
}

std::vector<int64_t> numbers(const std::string& text) {
    std::vector<int64_t> found;
    for (const auto& part : split(text, ',')) found.push_back(std::stoll(part));
    return found;
}

at::ScalarType dtype_of(const std::string& name) {
    static const std::unordered_map<std::string, at::ScalarType> known = {
        {"float32", at::kFloat}, {"float16", at::kHalf}, {"bfloat16", at::kBFloat16}, {"float64", at::kDouble},
        {"int8", at::kChar},     {"uint8", at::kByte},   {"int16", at::kShort},       {"int32", at::kInt},
        {"int64", at::kLong},    {"bool", at::kBool},
    };
    auto found = known.find(name);
    if (found == known.end()) throw std::runtime_error("a weight is of the dtype " + name + ", unknown to this client");
    return found->second;
}

// The weights of the graph by name, from the lines "graph, name, record, dtype, sizes" of the index.
std::unordered_map<std::string, at::Tensor> weights_of(caffe2::serialize::PyTorchStreamReader& file) {
    auto [index, size] = file.getRecord("extra/weights.tsv");
    std::unordered_map<std::string, at::Tensor> weights;
    for (const auto& line : split(std::string(static_cast<const char*>(index.get()), size), '\n')) {
        auto fields = split(line, '\t');
        if (fields.at(0) != GRAPH) continue;
        auto sizes = fields.size() > 4 ? numbers(fields[4]) : std::vector<int64_t>{};
        auto record = file.getRecord(fields[2]);
        auto bytes = std::make_shared<at::DataPtr>(std::move(std::get<0>(record)));
        weights[fields[1]] = at::from_blob(bytes->get(), sizes, [bytes](void*) {}, dtype_of(fields[3]));
    }
    return weights;
}

int main(int count, char** arguments) {
    if (count < 3) {
        std::cerr << "usage: client model.pt2 TOKEN,TOKEN… [TOKEN,TOKEN…]…\n";
        return 2;
    }
    try {
        c10::InferenceMode guard;
        std::vector<at::Tensor> rows;
        for (int i = 2; i < count; i++) rows.push_back(at::tensor(numbers(arguments[i]), at::kLong));

        caffe2::serialize::PyTorchStreamReader file{std::string(arguments[1])};
        auto weights = weights_of(file);
        torch::inductor::AOTIModelPackageLoader loader(arguments[1], GRAPH);
        loader.load_constants(weights, /*use_inactive=*/false, /*check_full_update=*/true, /*user_managed=*/true);

        auto logits = loader.run({at::stack(rows)}).at(0).to(at::kFloat).contiguous();
        for (int64_t i = 0; i < logits.numel(); i++) std::printf("%.9g\n", logits.const_data_ptr<float>()[i]);
    } catch (const std::exception& error) {
        std::cerr << "error: " << error.what() << "\n";
        return 1;
    }
}
