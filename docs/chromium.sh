#!/bin/sh
# Find Chromium and poppler's pdftocairo, or install Debian's where that is possible; exit 1 where Chromium is not to be had.
found=""
for name in chromium chromium-browser google-chrome; do
  command -v "$name" >/dev/null 2>&1 && found=yes
done
[ -n "$found" ] && command -v pdftocairo >/dev/null 2>&1 && exit 0
wanted="poppler-utils"
[ -n "$found" ] || wanted="chromium fonts-dejavu poppler-utils"
if command -v apt-get >/dev/null 2>&1; then
  run=""
  [ "$(id -u)" = 0 ] || { sudo -n true 2>/dev/null && run="sudo -n"; } || { [ -n "$found" ]; exit; }
  export DEBIAN_FRONTEND=noninteractive
  $run apt-get update -qq >/dev/null 2>&1
  $run apt-get install -y -qq --no-install-recommends $wanted >/dev/null 2>&1 && exit 0
fi
[ -n "$found" ]  # without pdftocairo figures are PDF only
