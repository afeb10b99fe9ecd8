// Keeps the videos of a clip in step, and lets the slider hold them at a frame.
for (const clip of document.querySelectorAll(".clip")) {
  const videos = [...clip.querySelectorAll("video")];
  const slider = clip.querySelector("input");
  const button = clip.querySelector("button");
  const at = clip.querySelector(".at");
  const fps = Number(clip.dataset.fps);
  const first = videos[0];
  const show = (frame) => {
    slider.value = frame;
    at.textContent = frame > 0 ? `frame ${frame} of ${slider.max}` : "prompt";
  };
  const pause = () => {
    for (const video of videos) video.pause();
    button.textContent = "Play";
  };
  const play = () => {
    for (const video of videos) {
      video.currentTime = first.currentTime;
      video.play().catch(pause);
    }
    button.textContent = "Pause";
  };
  button.addEventListener("click", () => (first.paused ? play() : pause()));
  slider.addEventListener("input", () => {
    pause();
    for (const video of videos) video.currentTime = (Number(slider.value) + 0.5) / fps;
    show(Number(slider.value));
  });
  setInterval(() => {
    if (first.paused) return;
    show(Math.min(Number(slider.max), Math.floor(first.currentTime * fps)));
    for (const video of videos.slice(1)) {
      if (Math.abs(video.currentTime - first.currentTime) > 0.2) {
        video.currentTime = first.currentTime;
      }
    }
  }, 120);
}
