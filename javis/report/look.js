// Moves the line of each clip's axis along while it plays, and seeks where the axis is clicked.
"use strict";
for (const clip of document.querySelectorAll(".clip")) {
  const video = clip.querySelector("video"), line = clip.querySelector(".playhead"), axis = clip.querySelector(".timeline");
  if (!video || !axis) continue;
  const left = Number(axis.dataset.left), right = Number(axis.dataset.right), seconds = Number(axis.dataset.seconds);
  const show = () => {
    const x = left + (right - left) * Math.min(1, video.currentTime / seconds);
    line.setAttribute("x1", x); line.setAttribute("x2", x);
  };
  const follow = () => { show(); if (!video.paused) requestAnimationFrame(follow); };
  video.addEventListener("play", () => {
    for (const other of document.querySelectorAll("video")) if (other !== video) other.pause();
    follow();
  });
  video.addEventListener("timeupdate", show);
  video.addEventListener("seeked", show);
  axis.addEventListener("click", (event) => {
    const box = axis.getBoundingClientRect(), unit = axis.viewBox.baseVal.width;
    const x = (event.clientX - box.left) / box.width * unit;
    const seek = () => { video.currentTime = Math.max(0, Math.min(1, (x - left) / (right - left))) * seconds; };
    if (video.readyState >= 1) seek();
    else { video.addEventListener("loadedmetadata", seek, { once: true }); video.load(); video.preload = "auto"; }
  });
}
