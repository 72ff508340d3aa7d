#!/usr/bin/env bash
# ONNX Runtime's C++ headers into DIR, where they are not there yet: its wheel brings the library alone.
# Usage: scripts/onnxruntime_headers.sh DIR   (on Debian; root is not needed)
# They are those of Debian 13's libonnxruntime-dev, which apt downloads and verifies. Nothing is installed. A library
# that is newer than its headers takes them.
set -euo pipefail

sums="7783e9664bdb0b1b36145b5c8587dd1bc9a399aa000edf2e3dd03003cafc6882  onnxruntime_c_api.h
b3b27d6a6fced0725e3f188379cca008b1d7a456997684756374d4b388f2cf05  onnxruntime_cxx_api.h
7f448e994c732eacd9e49900365fefa8f1ac998a6d6eb78e5f4aab1b8d9d8900  onnxruntime_cxx_inline.h
6c4db3d1954b266c4febe413351af86cac922e3448538e7e452e51d646e56a4a  onnxruntime_float16.h"
mkdir -p "$1"
cd "$1"
if sha256sum --status --check <<<"$sums" 2>/dev/null; then exit; fi

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' | awk '/\/debian\/?$/ && !found++')
[ -n "$mirror" ] || { echo "error: apt knows no mirror of Debian here" >&2; exit 1; }
echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror trixie main" >"$work/sources.list"
mkdir -p "$work/lists/partial" "$work/cache/archives/partial" "$work/unpacked"
options=(-qq -o "Dir::Etc::SourceList=$work/sources.list" -o Dir::Etc::SourceParts=- -o "Dir::State::Lists=$work/lists"
    -o "Dir::Cache=$work/cache" -o APT::Sandbox::User=)
apt-get "${options[@]}" update
(cd "$work" && apt-get "${options[@]}" download libonnxruntime-dev)
dpkg-deb -x "$work"/libonnxruntime-dev_*.deb "$work/unpacked"
(cd "$work/unpacked/usr/include/onnxruntime" && sha256sum --quiet --check <<<"$sums")
cut -d ' ' -f 3 <<<"$sums" | sed "s|^|$work/unpacked/usr/include/onnxruntime/|" | xargs cp -t .
