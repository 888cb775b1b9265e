// The page's words in English and Chinese, and numbers as each writes them.

const WORDS = {
  chat: ["Chat", "对话"],
  device: ["Device", "设备"],
  new_chat: ["New chat", "新对话"],
  settings: ["Settings", "设置"],
  other_language: ["中文", "English"],
  conversation: ["Conversation", "对话内容"],
  welcome: ["Ask the model on this machine", "向本机的模型提问"],
  welcome_more: [
    "It runs here, and what you write stays here. What it costs in time and memory is shown beside it.",
    "模型在本机运行，您写的内容不会离开本机。所用的时间和内存显示在旁边。",
  ],
  example_1: ["Why is the sky blue? Answer in two sentences.", "天空为什么是蓝色的？请用两句话回答。"],
  example_2: ["Write a short poem about a river.", "写一首关于河流的短诗。"],
  example_3: ["Name three uses of a Raspberry Pi.", "列举树莓派的三种用途。"],
  message: ["Your message", "您的消息"],
  ask: ["Ask something", "输入消息"],
  send: ["Send", "发送"],
  stop: ["Stop", "停止"],
  hint: ["Enter sends, Shift + Enter begins a line, Esc stops.", "回车发送，Shift + 回车换行，Esc 停止。"],
  you: ["You", "您"],
  answer: ["Answer", "回答"],
  again: ["Try again", "重试"],
  reading: ["reading the prompt", "正在读取提示"],
  busy: ["busy, asking again", "正忙，稍后重试"],
  queued: ["waiting for memory", "正在等待内存"],
  stopped: ["stopped", "已停止"],
  at_limit: ["ended at the limit of tokens", "已达词元上限"],
  context_full: ["the context is full", "上下文已满"],
  tokens: ["{n|token|tokens}", "{n} 个词元"],
  rate: ["{n} tokens/s", "{n} 词元/秒"],
  first_token: ["first token after {n} s", "首个词元 {n} 秒"],
  prompt_used: ["prompt {n}, {reused} of it reused", "提示 {n} 个词元，其中 {reused} 个复用"],
  context_used: ["context {used} of {allowed}", "上下文 {used} / {allowed}"],
  evicted: ["{n|token|tokens} left the context ({segments|passage|passages})", "{n} 个词元移出上下文（{segments} 段）"],
  recalled: ["{n|token|tokens} came back ({segments|passage|passages})", "{n} 个词元被召回（{segments} 段）"],
  pruned: ["{n|cell|cells} pruned", "修剪了 {n} 个缓存单元"],
  released: ["{n} given back", "释放 {n}"],
  processed: ["{name}: {n}", "{name}：{n}"],
  left_out: ["{name} failed and was left out", "{name} 失败，已跳过"],
  throughput: ["Tokens per second", "每秒词元"],
  tokens_per_second: ["tokens/s, all clients", "词元/秒（所有客户端）"],
  minute_ago: ["a minute ago", "一分钟前"],
  now: ["now", "现在"],
  peak: ["peak {n}", "峰值 {n}"],
  spark: ["Tokens per second in the last minute: now {now}, at most {peak}", "最近一分钟的每秒词元：现在 {now}，最高 {peak}"],
  answered: ["Tokens written", "生成的词元"],
  read: ["Tokens read", "读取的词元"],
  under_way: ["Requests under way", "进行中的请求"],
  queued_requests: ["of them waiting for memory", "其中等待内存"],
  clients: ["Connections", "连接"],
  memory: ["Memory", "内存"],
  of_mapped: ["of {n} weights", "/ {n} 权重"],
  unknown_mapped: ["of weights; the system cannot say how much is in memory", "权重；系统无法告知在内存中的部分"],
  resident: ["in memory", "在内存中"],
  only_mapped: ["mapped, not in memory", "已映射，不在内存"],
  cache: ["Caches", "缓存"],
  compute: ["Compute", "计算"],
  allowance: ["Allowance for caches and compute", "缓存和计算的配额"],
  held: ["of it held", "其中占用"],
  reserved: ["of it reserved", "其中预留"],
  taken: ["Taken in all", "共占用"],
  budget: ["All models may have", "所有模型可用"],
  budget_free: ["of it free", "其中空闲"],
  evictions: ["Models evicted", "换出的模型"],
  cooled: ["cooled down", "已冷却"],
  parked: ["parked on disk", "已存盘"],
  memory_by_unit: ["Memory by unit", "各单元的内存"],
  units: ["{n|unit|units}", "{n} 个单元"],
  unit: ["Unit", "单元"],
  share: ["Share in memory", "在内存中的比例"],
  bytes: ["In memory of all", "在内存中 / 全部"],
  context: ["Context, since the start", "上下文（启动以来）"],
  evicted_tokens: ["tokens evicted", "移出的词元"],
  recalled_tokens: ["tokens recalled", "召回的词元"],
  pruned_cells: ["cells pruned", "修剪的单元"],
  released_bytes: ["given back", "释放的内存"],
  passages: ["{n|passage|passages}", "{n} 段"],
  sessions: ["Your sessions", "您的会话"],
  this_page: ["this page", "本页"],
  unnamed: ["without a name", "未命名"],
  cells: ["{n|cell|cells}", "{n} 个单元"],
  all_sessions: ["{n|session|sessions} of all users", "所有用户共 {n} 个会话"],
  rules: ["Rules", "规则"],
  no_rules: ["The daemon was started without rules.", "守护进程启动时没有规则。"],
  rules_order: ["Post-processors in their order", "后处理的顺序"],
  version: ["Version", "版本"],
  daemon: ["Daemon", "守护进程"],
  model: ["Model", "模型"],
  architecture: ["Architecture", "架构"],
  engine: ["Engine", "引擎"],
  worker: ["Worker", "工作进程"],
  deaths: ["Worker deaths", "工作进程崩溃"],
  uptime: ["Uptime", "运行时间"],
  server_version: ["Version", "版本"],
  max_context: ["Context", "上下文"],
  ready: ["ready", "就绪"],
  no_model: ["no model", "没有模型"],
  none: ["not in memory", "不在内存"],
  waiting: ["waiting", "等待中"],
  failed: ["failed", "失败"],
  draining: ["ending", "正在结束"],
  offline: ["no answer", "无响应"],
  locked: ["key needed", "需要密钥"],
  starting: ["starting", "正在启动"],
  mapping: ["mapping", "映射"],
  load: ["loading", "加载"],
  packing: ["packing", "打包"],
  prefetch: ["reading ahead", "预读"],
  "warm-up": ["warming up", "预热"],
  opening: ["The model is being opened: {phase}", "正在打开模型：{phase}"],
  read_ahead: ["read ahead {n}", "已预读 {n}"],
  system_prompt: ["System prompt", "系统提示"],
  system_hint: ["left out", "不使用"],
  temperature: ["Temperature", "温度"],
  max_tokens: ["Most tokens", "最多词元"],
  default: ["default", "默认"],
  no_limit: ["until it ends", "直到结束"],
  settings_note: ["They hold from the next answer on. Rules are the daemon's.", "从下一个回答起生效。规则由守护进程决定。"],
  done: ["Done", "完成"],
  key_title: ["This daemon needs a key", "此守护进程需要密钥"],
  key_text: [
    "A line of its key_file. It is kept until this tab is closed, and goes nowhere but to this daemon.",
    "其 key_file 中的一行。它保存到此标签页关闭为止，并且只发送给此守护进程。",
  ],
  key: ["Key", "密钥"],
  enter: ["Enter", "进入"],
  no_connection: ["The daemon does not answer; is it still running?", "守护进程没有响应；它还在运行吗？"],
  broken_off: ["The answer was broken off before its end.", "回答在结束前中断了。"],
};

const STORE = "edge-rt-language";
const LANGUAGES = ["en", "zh-CN"];
let chosen = Math.max(0, LANGUAGES.indexOf(sessionStorage.getItem(STORE) ?? (navigator.language.startsWith("zh") ? "zh-CN" : "en")));

/** Words in the language there is; `{name}` in them is taken from `values`, and `{name|passage|passages}` says of what. */
export function say(name, values = {}) {
  const put = (_, key, one, more) => (one ? `${values[key]} ${values[key] === "1" ? one : more}` : values[key]);
  return WORDS[name][chosen].replace(/\{(\w+)(?:\|(\w+)\|(\w+))?\}/g, put);
}

/** Whether there are words of that name: phases and owners of memory may come that are newer than this page. */
export const known = (name) => Object.hasOwn(WORDS, name);

/** A number as it is written here, with so many digits behind the point. */
export function number(value, digits = 0) {
  return new Intl.NumberFormat(LANGUAGES[chosen], { minimumFractionDigits: digits, maximumFractionDigits: digits }).format(value);
}

/** Bytes: 98.4 MB. */
export function size(bytes) {
  let unit = "B";
  for (const next of ["kB", "MB", "GB", "TB"]) {
    if (Math.abs(bytes) < 1000) break;
    bytes /= 1000;
    unit = next;
  }
  return `${number(bytes, unit === "B" ? 0 : 1)} ${unit}`;
}

/** What is there of a whole: 1.2 / 2.2 MB. */
export function part(bytes, whole) {
  const [has, unit] = size(bytes).split(" ");
  return size(whole).endsWith(` ${unit}`) ? `${has} / ${size(whole)}` : `${size(bytes)} / ${size(whole)}`;
}

/** Seconds as the two largest units of them. */
export function duration(seconds) {
  const [s, m, h, d] = [seconds % 60, (seconds / 60) % 60, (seconds / 3600) % 24, seconds / 86400].map(Math.floor);
  return d ? `${d} d ${h} h` : h ? `${h} h ${m} min` : m ? `${m} min ${s} s` : `${s} s`;
}

/** Write the words that elements name: all of the document's, or those within one. */
export function translate(root = document) {
  document.documentElement.lang = LANGUAGES[chosen];
  for (const one of root.querySelectorAll("[data-say]")) one.textContent = say(one.dataset.say);
  for (const one of root.querySelectorAll("[data-say-label]")) one.setAttribute("aria-label", say(one.dataset.sayLabel));
  for (const one of root.querySelectorAll("[data-say-placeholder]")) one.placeholder = say(one.dataset.sayPlaceholder);
}

/** The other language, from now on. */
export function switchLanguage() {
  chosen = 1 - chosen;
  sessionStorage.setItem(STORE, LANGUAGES[chosen]);
  translate();
}
