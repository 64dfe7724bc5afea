#!/usr/bin/env bash
# fetch_headers.sh FOLDER [RELEASE]: ONNX Runtime's headers, for -DONNXRUNTIME_INCLUDE_DIR=FOLDER.
#
# They are those of Debian's libonnxruntime-dev, which first came with the release "trixie"; nothing is installed.
# Where the system is of that release or later, `apt-get install libonnxruntime-dev` does the same.
set -euo pipefail
folder=${1:?FOLDER} release=${2:-trixie}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# Systems have one form of these files or the other.
mirror=$({ cat /etc/apt/sources.list.d/*.sources /etc/apt/sources.list 2> /dev/null || true; } |
  awk '/^URIs:/ {print $2; exit} /^deb / {for (i = 2; i <= NF; ++i) if ($i ~ /:\/\//) {print $i; exit}}')
keys=/usr/share/keyrings/debian-archive-keyring.gpg
mkdir -p "$work"/lists/partial "$work"/cache/archives/partial "$work"/deb
echo "deb [signed-by=$keys] $mirror $release main" > "$work/sources.list"
apt=(-qq -o Dir::Etc::sourcelist="$work/sources.list" -o Dir::Etc::sourceparts=/dev/null
  -o Dir::State::Lists="$work/lists" -o Dir::Cache="$work/cache" -o APT::Sandbox::User=root)
apt-get "${apt[@]}" update
(cd "$work/deb" && apt-get "${apt[@]}" download libonnxruntime-dev)
dpkg -x "$work"/deb/libonnxruntime-dev_*.deb "$work/tree"
mkdir -p "$folder"
cp -r "$work"/tree/usr/include/onnxruntime/. "$folder"
