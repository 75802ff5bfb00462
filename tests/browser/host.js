// The host's side of a chat: the official bridge, with what the page asks for noted on `window`.
import { AppBridge, PostMessageTransport } from "@modelcontextprotocol/ext-apps/app-bridge";

window.noted = { messages: [], sizes: [], ready: 0 };
window.begin = async (source, hostContext) => {
  document.querySelector("iframe")?.remove();
  window.noted.ready = 0;
  const frame = document.createElement("iframe");
  frame.setAttribute("sandbox", "allow-scripts");
  frame.style.cssText = "width:900px;height:600px;border:0";
  document.body.append(frame);
  const bridge = new AppBridge(null, { name: "test host", version: "1" }, { serverTools: {}, message: { text: {} }, logging: {} }, { hostContext });
  bridge.oncalltool = (params) => window.callTool(params);
  bridge.onmessage = async (params) => { window.noted.messages.push(params); return {}; };
  bridge.onsizechange = (size) => { window.noted.sizes.push(size); if (size.height) frame.style.height = `${size.height}px`; };
  bridge.oninitialized = () => { window.noted.ready += 1; };
  window.bridge = bridge;
  window.frame = frame;
  await bridge.connect(new PostMessageTransport(frame.contentWindow, frame.contentWindow));
  frame.src = source;
};
