#include "network.h"

#include <algorithm>
#include <limits>
#include <tuple>

namespace aliked::core {
namespace {

constexpr size_t HALF = 2, FLOAT = 4, KEY = 8, TOTAL = 16;
constexpr long MOST = std::numeric_limits<int>::max();

// The steps of the straight line, by which buffers share memory.
enum Step {
  BLOCK1, BLOCK2, DEFORM1, DEFORM2, DEFORM3, DEFORM4, SCORE_HEAD, MAXIMA, MEAN, SELECT, REFINE,
  OFFSETS, SAMPLES, END
};

}  // namespace

bool Frame::operator<(const Frame &other) const {
  return std::tie(batch, height, width) < std::tie(other.batch, other.height, other.width);
}

Network::Network(const Weights &weights, const Selection &selection)
    : weights_(weights),
      shape_(weights.shape()),
      selection_(selection),
      memory_(weights.bytes().size(), "the weights") {
  const Stream stream = make_stream();
  check(driver().cuMemcpyHtoDAsync(memory_.get(), weights_.bytes().data(), weights_.bytes().size(),
                                   stream.get()),
        "copy the weights to the GPU");
  check(driver().cuStreamSynchronize(stream.get()), "copy the weights to the GPU");
}

int Network::keypoints(const Frame &frame) const {
  require(frame.batch >= 1, text("the batch has %d images; give at least 1", frame.batch));
  require(frame.height >= 5 && frame.width >= 5,
          text("the images are %dx%d pixels; both sides must be at least 5", frame.width,
               frame.height));
  // Kernels count in 32 bits inside one image; the largest map has 32 bytes a pixel.
  const long pixels = long(frame.height) + Frame::STRIDE > MOST / (long(frame.width) + Frame::STRIDE)
                          ? MOST
                          : long(frame.padded_height()) * frame.padded_width();
  require(pixels <= MOST / 32, text("images of %dx%d pixels are too large: the kernels count up to "
                                    "%ld pixels", frame.width, frame.height, MOST / 32));
  const Sizes sizes{frame.batch, frame.height, frame.width};
  const long k = std::min<long>(selection_.limit(), value_of_capacity(sizes));
  require(k <= MOST / frame.batch / std::max(shape_.dim, 2 * shape_.positions),
          text("%ld keypoints of %d images are too many for one batch", k, frame.batch));
  return int(k);
}

Buffers::Buffers(const Network &network, const Frame &frame)
    : network_(network), frame_(frame), k_(network.keypoints(frame)) {
  const Shape &shape = network.shape();
  const auto [c1, c2, c3, c4] = shape.channels;
  Sizes sizes{frame.batch, frame.height, frame.width, frame.batch * k_, 0, k_};
  capacity_ = value_of_capacity(sizes);
  room_ = value_of_room([&] { sizes.capacity = capacity_; return sizes; }());
  parts_ = value_of_parts(sizes);

  const size_t batch = size_t(frame.batch), rows = batch * size_t(k_), q = size_t(shape.quarter());
  const size_t full = batch * size_t(frame.padded_height()) * size_t(frame.padded_width());
  const size_t image = batch * size_t(frame.height) * size_t(frame.width);
  const auto map = [&](size_t scale, size_t channels, Step first, Step last) {
    return arena_.add(full / (scale * scale) * channels * HALF, first, last);
  };
  images_ = arena_.add(batch * frame.image_bytes(), BLOCK1, BLOCK1);
  x1_ = map(1, size_t(c1), BLOCK1, SAMPLES);
  below1_ = map(2, size_t(c1), BLOCK1, BLOCK2);
  s1_ = map(1, 8, BLOCK1, SCORE_HEAD);
  f2_ = map(2, q, BLOCK2, SAMPLES);
  below2_ = map(8, size_t(c2), BLOCK2, DEFORM2);
  s2_ = map(2, 8, BLOCK2, SCORE_HEAD);
  x3_ = map(8, size_t(c3), DEFORM1, DEFORM2);
  f3_ = map(8, q, DEFORM2, SAMPLES);
  below3_ = map(32, size_t(c3), DEFORM2, DEFORM4);
  s3_ = map(8, 8, DEFORM2, SCORE_HEAD);
  x4_ = map(32, size_t(c4), DEFORM3, DEFORM4);
  f4_ = map(32, q, DEFORM4, SAMPLES);
  none_ = arena_.add(1, DEFORM4, DEFORM4);  // the last level is not pooled
  s4_ = map(32, 8, DEFORM4, SCORE_HEAD);
  score_map_ = arena_.add(image * FLOAT, SCORE_HEAD, REFINE);
  tally_ = arena_.add(batch * TALLY * sizeof(int), SCORE_HEAD, REFINE);
  keys_ = arena_.add(batch * size_t(capacity_) * KEY, MAXIMA, SELECT);
  // What takes the threshold's place where no score passes: means, or what `prepare` writes.
  const bool by_mean = network.selection().by_mean();
  means_ = arena_.add(batch * FLOAT, by_mean ? MEAN : BLOCK1, by_mean ? SELECT : END);
  totals_ = arena_.add(batch * TOTAL, BLOCK1, END);  // zero between two runs
  chosen_ = arena_.add(batch * size_t(room_) * KEY, SELECT, REFINE);
  nms_scores_ = arena_.add(rows * FLOAT, REFINE, REFINE);
  dispersities_ = arena_.add(rows * FLOAT, REFINE, REFINE);
  offsets_ = arena_.add(rows * size_t(2 * shape.positions) * FLOAT, OFFSETS, SAMPLES);
  finished_ = arena_.add(size_t(parts_) * sizeof(int), OFFSETS, SAMPLES);
  const size_t shares = size_t(shape.positions / SHARE) * KEYPOINTS;
  sums_ = arena_.add(size_t(parts_) * shares * size_t(shape.dim) * FLOAT, SAMPLES, SAMPLES);
  keypoints_ = arena_.add(rows * 2 * FLOAT, REFINE, END);
  scores_ = arena_.add(rows * FLOAT, REFINE, END);
  descriptors_ = arena_.add(rows * size_t(shape.dim) * FLOAT, SAMPLES, END);
  memory_ = DeviceMemory(arena_.place(), text("%d images of %dx%d pixels", frame.batch,
                                              frame.width, frame.height).c_str());
}

void Buffers::prepare(CUstream stream) const {
  check(driver().cuMemsetD8Async(at(totals_), 0, size_t(frame_.batch) * TOTAL, stream),
        "clear a buffer");
  const Selection &selection = network_.selection();
  if (selection.by_mean()) return;
  // No score is above 1, and each maximum is above 0.
  const int instead = bits(selection.scores_th > 0 ? 1.f : 0.f);
  check(driver().cuMemsetD32Async(at(means_), unsigned(instead), size_t(frame_.batch), stream),
        "fill a buffer");
}

void Buffers::launch(CUstream stream, Kernels &kernels, CUdeviceptr images, const Outputs &outputs,
                     const std::function<void()> &when_refined) const {
  const Network &n = network_;
  const Shape &shape = n.shape();
  const auto [c1, c2, c3, c4] = shape.channels;
  const long q = shape.quarter();
  const int height = frame_.padded_height(), width = frame_.padded_width();
  const int top = frame_.top(), left = frame_.left();
  bool early = false;  // nothing comes before the first kernel
  const auto run = [&](const char *kernel, const Build *build, const Sizes &sizes,
                       const Arguments &arguments) {
    if (!build) throw Error(ALIKED_INTERNAL_ERROR, text("%s is not built for this model", kernel));
    kernels.launch(stream, kernel, *build, sizes, arguments, early);
    early = true;
  };
  const auto map_sizes = [&](int scale) {
    return Sizes{frame_.batch, height / scale, width / scale};
  };

  run("block1", find_build("blocks", {{"IN", 3}, {"OUT", c1}, {"QUARTER", q}}), map_sizes(1),
      Arguments() << images << n.weight("block1.fragments") << n.weight("block1.stem_bias")
                  << n.weight("block1.bias") << at(x1_) << at(below1_) << at(s1_) << frame_.height
                  << frame_.width << height << width << top << left);
  run("block2", find_build("blocks", {{"IN", c1}, {"OUT", c2}, {"QUARTER", q}}), map_sizes(2),
      Arguments() << at(below1_) << n.weight("block2.fragments") << n.weight("block2.first_bias")
                  << n.weight("block2.bias") << at(f2_) << at(below2_) << at(s2_) << height / 2
                  << width / 2);

  // A deformable layer of the map at 1 / scale; with a level it ends a block.
  const auto deform = [&](int layer, int scale, int x, int out, Constants constants, int shortcut,
                          int pooled, int score) {
    const Sizes sizes = map_sizes(scale);
    const long pool = constants["POOL"];
    constants["KIND"] = value_of_enough(sizes) ? 0 : kernels.has_clusters() && pool <= 1 ? 2 : 1;
    const std::string name = text("deform%d.", layer);
    Arguments arguments;
    arguments << at(x) << n.weight(name + "fragments") << n.weight(name + "offset_bias")
              << n.weight(name + "bias") << at(out);
    if (constants["LEVEL"])
      arguments << at(shortcut) << n.weight(name + "score_weight") << at(pooled) << at(score);
    arguments << height / scale << width / scale;
    run("deform", find_build("deform", constants), sizes, arguments);
  };
  const auto layer = [](long in, long out) {
    return Constants{{"CI", in}, {"CO", out}, {"LEVEL", 0}, {"POOL", 0}};
  };
  const auto level = [q](long channels, long below, long pool) {
    return Constants{{"CI", channels}, {"CO", channels}, {"LEVEL", 1},
                     {"CS", below},    {"QUARTER", q},   {"POOL", pool}};
  };
  deform(1, 8, below2_, x3_, layer(c2, c3), none_, none_, none_);
  deform(2, 8, x3_, f3_, level(c3, c2, 4), below2_, below3_, s3_);
  deform(3, 32, below3_, x4_, layer(c3, c4), none_, none_, none_);
  deform(4, 32, x4_, f4_, level(c4, c3, 1), below3_, none_, s4_);

  Sizes sizes{frame_.batch, frame_.height, frame_.width, frame_.batch * k_, 0, k_, room_,
              capacity_};
  run("score_head", find_build("score_head", {}), {frame_.batch, frame_.height, width},
      Arguments() << at(s1_) << at(s2_) << at(s3_) << at(s4_) << n.weight("score_head.fragments")
                  << n.weight("score_head.first_bias") << n.weight("score_head.second_bias")
                  << at(score_map_) << at(tally_) << height << width << top << left
                  << frame_.height << frame_.width);
  run("find_maxima", find_build("maxima", {}), sizes,
      Arguments() << at(score_map_) << at(keys_) << at(tally_) << frame_.height << frame_.width);
  const Selection &selection = n.selection();
  if (selection.by_mean())
    run("mean_scores", find_build("mean", {}), sizes,
        Arguments() << at(score_map_) << at(totals_) << at(means_)
                    << frame_.height * frame_.width);
  const Build *build = find_build("selection", {{"EACH", value_of_each(sizes)}});
  const int threshold = selection.scores_th > 0 ? bits(selection.scores_th) : -1;
  run("select_keys", build, sizes,
      Arguments() << at(keys_) << at(tally_) << at(selection.by_threshold() ? means_ : tally_)
                  << at(chosen_) << int(selection.by_threshold()) << int(capacity_) << int(room_)
                  << int(k_) << threshold);
  run("refine_keypoints", build, sizes,
      Arguments() << at(chosen_) << at(tally_) << at(score_map_) << at(keypoints_)
                  << outputs.scores << at(nms_scores_) << at(dispersities_) << frame_.height
                  << frame_.width << int(room_) << int(k_));
  if (when_refined) when_refined();

  build = find_build("describe", {{"C1", c1}, {"QUARTER", q}, {"POSITIONS", shape.positions}});
  const auto maps = [&](Arguments arguments) {
    arguments << at(x1_) << at(f2_) << at(f3_) << at(f4_) << height << width;
    for (int scale : {2, 8, 32}) {
      // Pixels of the level per pixel of the frame, corners aligned.
      const double down = height / scale, across = width / scale;
      arguments << int(down) << int(across) << bits(float((down - 1) / (height - 1)))
                << bits(float((across - 1) / (width - 1)));
    }
    return arguments << n.weight("descriptor.level_fragments");
  };
  const int rows = int(frame_.batch * k_);
  run("sample_offsets", build, sizes,
      maps(Arguments() << at(keypoints_))
          << n.weight("descriptor.patch_fragments") << n.weight("descriptor.patch_bias")
          << n.weight("descriptor.offset_bias") << at(offsets_) << at(finished_) << rows
          << int(k_) << top << left << frame_.height << frame_.width);
  run("sample_descriptors", build, sizes,
      maps(Arguments() << at(keypoints_) << at(offsets_))
          << n.weight("descriptor.sample_fragments") << at(sums_) << at(finished_)
          << outputs.descriptors << rows << int(k_) << top << left << frame_.height
          << frame_.width);
}

}  // namespace aliked::core
