// Runs an AOTInductor package: run_package model.pt2 inputs outputs, the latter two as torch.save and torch.load have them.

#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/torch.h>

#include <fstream>
#include <iostream>
#include <iterator>
#include <vector>

int main(int count, char** arguments) {
  if (count != 4) {
    std::cerr << "usage: run_package model.pt2 inputs outputs\n";
    return 2;
  }
  try {
    std::ifstream file(arguments[2], std::ios::binary);
    const at::IValue given = torch::pickle_load({std::istreambuf_iterator<char>(file), {}});
    std::vector<at::Tensor> inputs;
    for (const at::IValue& value : given.toListRef()) inputs.push_back(value.toTensor());
    torch::inductor::AOTIModelPackageLoader package(arguments[1]);
    // A tuple, for torch.load does not trust the way in which C++ writes a list.
    std::vector<at::IValue> outputs;
    for (const at::Tensor& output : package.run(inputs)) outputs.emplace_back(output);
    const std::vector<char> made = torch::pickle_save(c10::ivalue::Tuple::create(std::move(outputs)));
    std::ofstream(arguments[3], std::ios::binary).write(made.data(), static_cast<std::streamsize>(made.size()));
  } catch (const std::exception& error) {
    std::cerr << error.what() << "\n";
    return 1;
  }
  return 0;
}
