// The tiles of a format by their units of rows and their vectors, out of the `tile` of the namespace that includes this.

template <class Format, std::size_t... I>
constexpr Tiles<Format> tile_table(std::index_sequence<I...>) {
  return {tile<Format, I / kVecs + 1, I % kVecs + 1>...};
}

// Found by the format's namespace.
template <class Format>
const Tiles<Format>& tiles(Format) {
  static constexpr Tiles<Format> table = tile_table<Format>(std::make_index_sequence<Format::kUnits * kVecs>());
  return table;
}
