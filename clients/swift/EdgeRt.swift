// A client of edge-rt's daemon (docs/protocol.md, version 1). One file, Foundation alone; for Apple's systems and Linux.
// The parts and their names are those of clients/node/edge-rt.js.

import Foundation

#if canImport(Darwin)
    import Darwin
#else
    import Glibc
#endif

private let maxBytes = 16 << 20  // of a frame, without its length
private let maxDepth = 32  // maps and lists within each other
private let ackEvery: Int64 = 8  // events of a resumable stream between two acknowledgements
private let unread = 64  // events of a stream that is not resumable, before no more is read from the socket
private let pauses = [0.05, 0.2, 0.5, 1.0, 2.0]  // seconds between attempts to connect again

/// What the daemon answered where it could not do as asked. `code` and `fields` are the protocol's; `disconnected` is this client's.
public struct EdgeRtError: Error, Equatable {
    public let code: String
    public let message: String
    public let fields: Message

    public init(_ code: String, _ message: String, _ fields: Message = [:]) {
        self.code = code
        self.message = message
        self.fields = fields
    }
}

/// A map as the protocol has it.
public typealias Message = [String: Value]

/// A value of the protocol. `unsigned` holds only what is beyond `integer`.
public enum Value: Equatable, Sendable {
    case null
    case flag(Bool)
    case integer(Int64)
    case unsigned(UInt64)
    case number(Double)
    case text(String)
    case list([Value])
    case map(Message)

    public var text: String? { if case .text(let found) = self { return found } else { return nil } }
    public var integer: Int64? { if case .integer(let found) = self { return found } else { return nil } }
    public var number: Double? { if case .number(let found) = self { return found } else { return nil } }
    public var list: [Value]? { if case .list(let found) = self { return found } else { return nil } }
    public var map: Message? { if case .map(let found) = self { return found } else { return nil } }
}

extension Value: ExpressibleByStringLiteral, ExpressibleByIntegerLiteral, ExpressibleByFloatLiteral, ExpressibleByBooleanLiteral,
    ExpressibleByArrayLiteral, ExpressibleByDictionaryLiteral
{
    public init(stringLiteral value: String) { self = .text(value) }
    public init(integerLiteral value: Int64) { self = .integer(value) }
    public init(floatLiteral value: Double) { self = .number(value) }
    public init(booleanLiteral value: Bool) { self = .flag(value) }
    public init(arrayLiteral elements: Value...) { self = .list(elements) }
    public init(dictionaryLiteral elements: (String, Value)...) { self = .map(Message(elements) { $1 }) }
}

// MARK: - MessagePack

/// MessagePack without extension types and binary values.
public enum MessagePack {
    /// A value as bytes.
    public static func encode(_ value: Value) -> [UInt8] {
        var out: [UInt8] = []
        write(value, &out)
        return out
    }

    /// The value that these bytes are. Throws EdgeRtError `bad_frame`.
    public static func decode(_ bytes: [UInt8]) throws -> Value {
        var reader = Reader(data: bytes)
        let value = try reader.value(1)
        if reader.at != bytes.count { throw EdgeRtError("bad_frame", "there are bytes after the value") }
        return value
    }

    fileprivate static func number(_ code: UInt8?, _ size: Int, _ number: UInt64, _ out: inout [UInt8]) {
        if let code { out.append(code) }
        for shift in stride(from: 8 * (size - 1), through: 0, by: -8) { out.append(UInt8(truncatingIfNeeded: number >> UInt64(shift))) }
    }

    /// A length: in the code itself if it is short (`small`: how many fit), else in 1 (if there is such a code), 2 or 4 bytes after it.
    private static func length(_ count: Int, _ fix: UInt8, _ small: Int, _ code8: UInt8, _ code16: UInt8, _ out: inout [UInt8]) {
        if count < small {
            out.append(fix | UInt8(count))
        } else if code8 != 0 && count < 0x100 {
            number(code8, 1, UInt64(count), &out)
        } else if count < 0x10000 {
            number(code16, 2, UInt64(count), &out)
        } else {
            number(code16 + 1, 4, UInt64(count), &out)
        }
    }

    private static func write(_ value: Value, _ out: inout [UInt8]) {
        switch value {
        case .null: out.append(0xc0)
        case .flag(let found): out.append(found ? 0xc3 : 0xc2)
        case .integer(let found) where found >= -32 && found < 128: out.append(UInt8(truncatingIfNeeded: found))
        case .integer(let found): number(found < 0 ? 0xd3 : 0xcf, 8, UInt64(bitPattern: found), &out)
        case .unsigned(let found): number(0xcf, 8, found, &out)
        case .number(let found): number(0xcb, 8, found.bitPattern, &out)
        case .text(let found):
            let data = Array(found.utf8)
            length(data.count, 0xa0, 32, 0xd9, 0xda, &out)
            out += data
        case .list(let found):
            length(found.count, 0x90, 16, 0, 0xdc, &out)
            for one in found { write(one, &out) }
        case .map(let found):
            length(found.count, 0x80, 16, 0, 0xde, &out)
            for (key, one) in found {
                write(.text(key), &out)
                write(one, &out)
            }
        }
    }

    private struct Reader {
        let data: [UInt8]
        var at = 0

        mutating func take(_ count: Int) throws -> ArraySlice<UInt8> {
            if count > data.count - at { throw EdgeRtError("bad_frame", "a value ends too early") }
            at += count
            return data[(at - count)..<at]
        }

        mutating func unsigned(_ size: Int) throws -> UInt64 {
            try take(size).reduce(0) { $0 << 8 | UInt64($1) }
        }

        mutating func signed(_ size: Int) throws -> Int64 {
            Int64(bitPattern: try unsigned(size) << UInt64(64 - 8 * size)) >> Int64(64 - 8 * size)
        }

        mutating func value(_ depth: Int) throws -> Value {
            let code = Int(try unsigned(1))
            switch code {
            case 0..<0x80: return .integer(Int64(code))
            case 0xe0...0xff: return .integer(Int64(code) - 0x100)
            case 0x80..<0x90: return try map(code & 0x0f, depth)
            case 0x90..<0xa0: return try list(code & 0x0f, depth)
            case 0xa0..<0xc0: return try text(code & 0x1f)
            case 0xc0: return .null
            case 0xc2: return .flag(false)
            case 0xc3: return .flag(true)
            case 0xca: return .number(Double(Float(bitPattern: UInt32(try unsigned(4)))))
            case 0xcb: return .number(Double(bitPattern: try unsigned(8)))
            case 0xcc...0xcf:
                let found = try unsigned(1 << (code - 0xcc))
                return found > UInt64(Int64.max) ? .unsigned(found) : .integer(Int64(found))
            case 0xd0...0xd3: return .integer(try signed(1 << (code - 0xd0)))
            case 0xd9...0xdb: return try text(Int(try unsigned(1 << (code - 0xd9))))
            case 0xdc, 0xdd: return try list(Int(try unsigned(2 << (code - 0xdc))), depth)
            case 0xde, 0xdf: return try map(Int(try unsigned(2 << (code - 0xde))), depth)
            default: throw EdgeRtError("bad_frame", "the protocol has no values of kind 0x\(String(code, radix: 16))")
            }
        }

        mutating func text(_ count: Int) throws -> Value {
            guard let found = String(bytes: try take(count), encoding: .utf8) else { throw EdgeRtError("bad_frame", "a text is not UTF-8") }
            return .text(found)
        }

        mutating func list(_ count: Int, _ depth: Int) throws -> Value {
            try deep(depth)
            var found: [Value] = []
            for _ in 0..<count { found.append(try value(depth + 1)) }
            return .list(found)
        }

        mutating func map(_ count: Int, _ depth: Int) throws -> Value {
            try deep(depth)
            var found = Message()
            for _ in 0..<count {
                guard let key = try value(depth + 1).text else { throw EdgeRtError("bad_frame", "the key of a map is no text") }
                found[key] = try value(depth + 1)
            }
            return .map(found)
        }

        func deep(_ depth: Int) throws {
            if depth > maxDepth { throw EdgeRtError("bad_frame", "more than \(maxDepth) maps and lists within each other") }
        }
    }
}

// MARK: - Frames

/// Bytes in as they come, whole messages out.
public struct Frames {
    private var held: [UInt8] = []

    public init() {}

    /// A message as a frame.
    public static func encode(_ message: Message) -> [UInt8] {
        let body = MessagePack.encode(.map(message))
        var out: [UInt8] = []
        MessagePack.number(nil, 4, UInt64(body.count), &out)
        return out + body
    }

    /// The messages that are complete now. Throws EdgeRtError; after that the stream cannot be read any more.
    public mutating func feed<Bytes: Sequence>(_ data: Bytes) throws -> [Message] where Bytes.Element == UInt8 {
        held.append(contentsOf: data)
        var start = 0
        var found: [Message] = []
        while held.count - start >= 4 {
            let length = held[start..<start + 4].reduce(0) { $0 << 8 | Int($1) }
            if length > maxBytes { throw EdgeRtError("frame_too_long", "a frame of \(length) bytes is too long") }
            if held.count - start - 4 < length { break }
            guard let message = try MessagePack.decode(Array(held[start + 4..<start + 4 + length])).map else {
                throw EdgeRtError("bad_frame", "a frame is no map")
            }
            found.append(message)
            start += 4 + length
        }
        held.removeFirst(start)
        return found
    }
}

// MARK: - The conversation

/// What comes for one request. `request`: its id, another one after the stream was resumed.
public final class Answers {
    public internal(set) var request: Int64
    /// The answer's message, nil until it has come.
    public internal(set) var end: Message?
    fileprivate var stream: String?
    fileprivate var seq: Int64 = 0  // of the last event received
    fileprivate var taken: Int64 = 0  // of the last event taken
    fileprivate var acknowledged: Int64 = 0
    fileprivate var events: [Message] = []
    fileprivate var cancelled = false
    fileprivate var left = false  // nobody takes its events any more
    fileprivate var lost = false  // its connection broke, and it was not resumed yet

    fileprivate init(_ request: Int64) { self.request = request }

    /// The answer. Throws EdgeRtError if it is one.
    public func result() throws -> Message {
        if let error = end?["error"]?.map { throw errorOf(error) }
        return end?["ok"]?.map ?? [:]
    }
}

private func errorOf(_ error: Message) -> EdgeRtError {
    let rest = error.filter { $0.key != "code" && $0.key != "message" }
    return EdgeRtError(error["code"]?.text ?? "internal", error["message"]?.text ?? "", rest)
}

private let gone: Message = ["code": "disconnected", "message": "the daemon has closed the connection"]

/// The protocol without input or output: requests in, bytes out; bytes in, answers out. Not for two threads at once.
public final class Conversation {
    private var frames = Frames()
    private var asked: [Int64: Answers] = [:]
    private var broken: [Answers] = []
    private var number: Int64 = 0
    private var out: [UInt8] = []
    private var farewell = gone
    private var frameBytes = Int64(maxBytes)
    private var ackAfter = ackEvery

    public init() {}

    /// Whether there are streams to go on with in another connection.
    public var isBroken: Bool { !broken.isEmpty }

    /// A request. Throws EdgeRtError `frame_too_long`.
    public func ask(_ op: String, _ fields: Message) throws -> Answers {
        let data = Frames.encode(fields.merging(["id": .integer(number + 1), "op": .text(op)]) { $1 })
        if data.count - 4 > frameBytes {
            throw EdgeRtError("frame_too_long", "a request of \(data.count - 4) bytes is too long; \(frameBytes) are allowed")
        }
        number += 1
        let answers = Answers(number)
        asked[number] = answers
        out += data
        return answers
    }

    /// The first request of a connection.
    public func greet(_ client: String, key: String?) throws -> Answers {
        out = []  // what was to be sent before was the other connection's, and so was what has come
        frames = Frames()
        frameBytes = Int64(maxBytes)
        return try ask("hello", ["versions": [1], "client": .text(client), "key": key.map(Value.text) ?? .null])
    }

    /// What hello was answered.
    public func greeted(_ hello: Message) {
        let limits = hello["limits"]?.map
        frameBytes = limits?["frame_bytes"]?.integer ?? frameBytes
        ackAfter = max(1, min(ackEvery, (limits?["credits"]?.integer ?? 2) / 2))
    }

    /// After hello in another connection: go on with the streams that broke.
    public func resume() throws {
        for answers in broken {
            answers.request = try ask("resume", ["stream": .text(answers.stream ?? ""), "after": .integer(answers.seq)]).request
            asked[answers.request] = answers
            answers.lost = false
            answers.acknowledged = answers.seq  // by `after`
            if answers.cancelled { _ = try ask("cancel", ["request": .integer(answers.request)]) }
        }
        broken = []
    }

    /// The generation is to end soon.
    public func cancel(_ answers: Answers) {
        if answers.cancelled || answers.end != nil { return }
        answers.cancelled = true
        if asked[answers.request] != nil {  // else when it is resumed
            _ = try? ask("cancel", ["request": .integer(answers.request)])  // too short to be too long
        }
    }

    /// Nobody takes its events any more.
    public func leave(_ answers: Answers) {
        answers.left = true
        while take(answers) != nil {}
        cancel(answers)
    }

    /// The next event, nil if there is none now. What is taken is acknowledged, so that the daemon waits for who is slow.
    public func take(_ answers: Answers) -> Message? {
        let message = answers.events.isEmpty ? nil : answers.events.removeFirst()
        if let message { answers.taken = message["seq"]?.integer ?? 0 }
        acknowledge(answers)
        return message
    }

    private func acknowledge(_ answers: Answers) {
        guard let stream = answers.stream, !answers.lost else { return }
        let over = answers.end != nil && answers.events.isEmpty
        if over { answers.taken = answers.seq }
        if answers.taken - answers.acknowledged < (over ? 1 : ackAfter) { return }
        answers.acknowledged = answers.taken
        out += Frames.encode(["op": "ack", "stream": .text(stream), "seq": .integer(answers.taken)])
    }

    /// Bytes came. Throws EdgeRtError if they are none of the daemon's.
    public func received<Bytes: Sequence>(_ data: Bytes) throws where Bytes.Element == UInt8 {
        for message in try frames.feed(data) { took(message) }
    }

    private func took(_ message: Message) {
        guard let id = message["id"]?.integer, let answers = asked[id] else {
            if message["id"] == .null, let error = message["error"]?.map { farewell = error }
            return
        }
        answers.seq = message["seq"]?.integer ?? answers.seq
        switch message["event"]?.text {
        case nil:
            answers.end = message
            asked[id] = nil
        case "stream": answers.stream = message["stream"]?.text
        default: answers.events.append(message)
        }
        if answers.left {
            while take(answers) != nil {}
        } else if answers.end != nil {
            acknowledge(answers)
        }
    }

    /// Whether somebody does not take what comes, and the daemon would not wait by itself.
    public var full: Bool { asked.values.contains { $0.stream == nil && $0.events.count >= unread } }

    /// What was asked is not answered any more, but for streams that can be resumed.
    public func disconnected() {
        for answers in asked.values.sorted(by: { $0.request < $1.request }) {
            answers.lost = answers.stream != nil
            if answers.lost { broken.append(answers) } else { answers.end = ["error": .map(farewell)] }
        }
        asked = [:]
        out = []
        frames = Frames()
        farewell = gone
    }

    /// There is no other connection for the streams that broke.
    public func giveUp(_ error: EdgeRtError) {
        for answers in broken { answers.end = ["error": ["code": .text(error.code), "message": .text(error.message)]] }
        broken = []
    }

    /// Bytes to write now.
    public func toSend() -> [UInt8] {
        defer { out = [] }
        return out
    }
}

// MARK: - The client

/// A connection to the daemon, for any number of requests at once, from any thread. Streams that are `resumable` go on when it breaks;
/// what is asked after that connects again. Everything throws EdgeRtError. What is not `async` waits, and is not for the main thread.
public final class Client: @unchecked Sendable {
    private let dial: () throws -> Int32
    private let key: String?
    private let condition = NSCondition()  // guards all that follows
    private let conversation = Conversation()
    private let writer = DispatchQueue(label: "edge-rt writer")
    private var transport: Transport?
    private var ready = false  // hello was answered in it
    private var opening = false
    private var closed = false
    private var said: Message = [:]

    /// `dial` makes a connected socket each time, or throws; see `unixSocket`. `key`: for TCP.
    public init(key: String? = nil, dial: @escaping () throws -> Int32) throws {
        self.dial = dial
        self.key = key
        try open()
    }

    /// A daemon at a Unix domain socket.
    public convenience init(path: String) throws {
        try self.init { try unixSocket(path) }
    }

    deinit { transport?.shut() }

    /// What the daemon said of itself: version, server, capabilities, limits.
    public var hello: Message { locked { said } }

    /// Ask, and wait for the answer.
    public func call(_ op: String, _ fields: Message = [:]) throws -> Message {
        let answers = try ask(op, fields)
        return try locked {
            while answers.end == nil { condition.wait() }
            return try answers.result()
        }
    }

    /// Answer a prompt. `resumable`: it goes on when the connection breaks. `options`: those of the document.
    public func generate(
        _ prompt: String, options: Message = [:], session: String? = nil, priority: String? = nil, resumable: Bool = false
    ) throws -> Generation {
        try generate(["prompt": .text(prompt)], options, session, priority, resumable)
    }

    /// Answer a conversation: maps with `role` and `content`.
    public func generate(
        messages: [Message], options: Message = [:], session: String? = nil, priority: String? = nil, resumable: Bool = false
    ) throws -> Generation {
        try generate(["messages": .list(messages.map(Value.map))], options, session, priority, resumable)
    }

    private func generate(_ said: Message, _ options: Message, _ session: String?, _ priority: String?, _ resumable: Bool) throws -> Generation {
        var fields = said
        fields["session"] = session.map(Value.text)
        fields["priority"] = priority.map(Value.text)
        fields["resumable"] = .flag(resumable)
        fields["options"] = .map(options)
        return Generation(self, try ask("generate", fields))
    }

    /// Embeddings of texts, in their order. `options`: `pooling`, `normalize`, `dimensions`.
    public func embed(_ texts: [String], options: Message = [:]) throws -> [[Double]] {
        var fields = options
        fields["texts"] = .list(texts.map(Value.text))
        let events = Generation(self, try ask("embed", fields))
        var found: [[Double]] = []
        while let event = try events.next() {
            if event["event"] == "embedding" { found.append((event["embedding"]?.list ?? []).compactMap { $0.number }) }
        }
        return found
    }

    /// Open a session. `keep`: it outlives this connection for a while.
    public func openSession(keep: Bool = false, context: Int64? = nil) throws -> Session {
        let found = try call("open_session", ["keep": .flag(keep), "context": context.map(Value.integer) ?? .null])
        return Session(self, found["session"]?.text ?? "")
    }

    /// Open a session that was saved under a name.
    public func restoreSession(_ name: String, keep: Bool = false) throws -> Session {
        Session(self, try call("restore_session", ["name": .text(name), "keep": .flag(keep)])["session"]?.text ?? "")
    }

    /// The user's saved sessions: `name`, `bytes`, and when each was `saved`, in seconds since 1970.
    public func savedSessions() throws -> [Message] {
        (try call("list_saved")["saved"]?.list ?? []).compactMap { $0.map }
    }

    /// Delete what was saved under a name.
    public func deleteSaved(_ name: String) throws {
        _ = try call("delete_saved", ["name": .text(name)])
    }

    /// What the daemon is at.
    public func status() throws -> Message { try call("status") }

    /// Leave; what runs for this connection ends.
    public func close() {
        let (to, data) = locked {
            closed = true
            defer { lose(transport) }
            return (transport, conversation.toSend())
        }
        guard let to else { return }
        let written = DispatchSemaphore(value: 0)
        writer.async {
            _ = to.write(data)
            written.signal()
        }
        _ = written.wait(timeout: .now() + 1)  // who reads nothing does not keep us
        to.shut()
    }

    fileprivate func ask(_ op: String, _ fields: Message) throws -> Answers {
        while true {
            let answers: Answers? = try locked {
                if closed { throw EdgeRtError("disconnected", "the client was closed") }
                if !ready { return nil }
                defer { flush() }
                return try conversation.ask(op, fields)
            }
            if let answers { return answers }
            try openAgain()
        }
    }

    /// The next event, nil after the last. Throws EdgeRtError.
    fileprivate func next(_ answers: Answers) throws -> Message? {
        try locked {
            while true {
                let message = conversation.take(answers)
                flush()
                if message != nil { return message }
                if answers.end != nil {
                    _ = try answers.result()
                    return nil
                }
                condition.wait()
            }
        }
    }

    fileprivate func cancel(_ answers: Answers, leave: Bool) {
        locked {
            if leave { conversation.leave(answers) } else { conversation.cancel(answers) }
            flush()
        }
    }

    private func locked<Result>(_ work: () throws -> Result) rethrows -> Result {
        condition.lock()
        defer { condition.unlock() }
        return try work()
    }

    /// Let what is to be sent be written, by a thread that nobody waits for; and somebody may go on. To be called with the lock.
    private func flush() {
        condition.broadcast()
        writer.async { [self] in
            let (to, data) = locked { (transport, conversation.toSend()) }
            if let to, !data.isEmpty, !to.write(data) { to.shut() }  // the reader takes it from there
        }
    }

    /// A connection in which hello was said.
    private func open() throws {
        let to = Transport(try dial())
        do {
            try locked {
                if closed { throw EdgeRtError("disconnected", "the client was closed") }
                transport = to
                let answers = try conversation.greet("edge-rt-swift/1", key: key)
                flush()
                Thread.detachNewThread { [weak self] in
                    while let data = to.read(), let client = self, client.took(data, to) {}
                    self?.ended(to)
                }
                while answers.end == nil { condition.wait() }
                said = try answers.result()
                if transport !== to { throw EdgeRtError("disconnected", "the daemon has closed the connection") }
                conversation.greeted(said)
                ready = true
                try conversation.resume()
                flush()
            }
        } catch {
            to.shut()
            throw error
        }
    }

    /// Bytes came. False if no more are wanted.
    private func took(_ data: [UInt8], _ from: Transport) -> Bool {
        locked {
            if transport !== from { return false }
            do { try conversation.received(data) } catch { return false }  // what cannot be read is the same as its end
            flush()
            while conversation.full && transport === from { condition.wait() }
            return true
        }
    }

    /// A connection's end: go on in another one, as long as there are streams to go on with.
    private func ended(_ from: Transport) {
        from.shut()
        let again = locked { lose(from) && broke && !opening }
        if again { try? openAgain() }  // the streams were told by giveUp
    }

    /// This connection is no more. False if that is known. To be called with the lock.
    @discardableResult
    private func lose(_ which: Transport?) -> Bool {
        if transport !== which { return false }
        transport = nil
        ready = false
        conversation.disconnected()
        if closed { conversation.giveUp(EdgeRtError("disconnected", "the client was closed")) }
        condition.broadcast()
        return true
    }

    /// Connect again, or wait for who does.
    private func openAgain() throws {
        let mine: Bool = try locked {
            if ready { return false }
            if opening {
                while opening { condition.wait() }
                if !ready { throw EdgeRtError("disconnected", "the daemon has closed the connection") }
                return false
            }
            opening = true
            return true
        }
        if !mine { return }
        defer {
            locked {
                opening = false
                condition.broadcast()
            }
        }
        var again = true
        while again {
            try attempts()
            again = locked {  // a connection that broke meanwhile was left to us
                opening = broke
                return opening
            }
        }
    }

    /// Whether streams wait for another connection. To be called with the lock.
    private var broke: Bool { !ready && !closed && conversation.isBroken }

    private func attempts() throws {
        var left = pauses[...]
        while true {
            do {
                return try open()
            } catch let error as EdgeRtError {
                guard error.code == "disconnected", !locked({ closed }), let pause = left.popFirst() else {
                    locked {
                        conversation.giveUp(error)
                        condition.broadcast()
                    }
                    throw error
                }
                Thread.sleep(forTimeInterval: pause)
            }
        }
    }
}

/// The events of one answer, to be taken by one thread or task; the last is `done`.
public final class Generation: @unchecked Sendable {
    private let client: Client
    private let answers: Answers
    private let queue = DispatchQueue(label: "edge-rt generation")

    fileprivate init(_ client: Client, _ answers: Answers) {
        self.client = client
        self.answers = answers
    }

    /// Waits for the next event, nil after the last. Throws EdgeRtError.
    public func next() throws -> Message? { try client.next(answers) }

    /// The same as a stream for `for try await`. Its events are taken only when asked for; when its task is cancelled, so is the answer.
    public var events: AsyncThrowingStream<Message, Error> {
        AsyncThrowingStream { [self] in
            try await withTaskCancellationHandler {
                try await withCheckedThrowingContinuation { continuation in
                    queue.async { [self] in continuation.resume(with: Result { try next() }) }
                }
            } onCancel: {
                close()
            }
        }
    }

    /// It is to end soon; its events go on until `done`, whose reason is then `cancelled`. From any thread.
    public func cancel() { client.cancel(answers, leave: false) }

    /// Nobody takes its events any more; to be called by who does not take all of them.
    public func close() { client.cancel(answers, leave: true) }

    /// All of its text.
    public func text() throws -> String {
        var found = ""
        while let event = try next() {
            if event["event"] == "delta" { found += event["text"]?.text ?? "" }
        }
        return found
    }
}

/// A session in the daemon.
public final class Session: @unchecked Sendable {
    public let id: String
    private let client: Client

    fileprivate init(_ client: Client, _ id: String) {
        self.client = client
        self.id = id
    }

    /// See `Client.generate`.
    public func generate(_ prompt: String, options: Message = [:], priority: String? = nil, resumable: Bool = false) throws -> Generation {
        try client.generate(prompt, options: options, session: id, priority: priority, resumable: resumable)
    }

    /// See `Client.generate`.
    public func generate(
        messages: [Message], options: Message = [:], priority: String? = nil, resumable: Bool = false
    ) throws -> Generation {
        try client.generate(messages: messages, options: options, session: id, priority: priority, resumable: resumable)
    }

    /// Another session that goes on from what was said in this one.
    public func clone(keep: Bool = false) throws -> Session {
        Session(client, try client.call("clone_session", ["session": .text(id), "keep": .flag(keep)])["session"]?.text ?? "")
    }

    /// Keep it under a name, in the daemon's folder.
    public func save(_ name: String) throws { _ = try client.call("save_session", ["session": .text(id), "name": .text(name)]) }

    public func close() throws { _ = try client.call("close_session", ["session": .text(id)]) }
}

// MARK: - Sockets

/// A connected socket. Its descriptor is closed when nobody has it any more, so that no other file can come by its number before.
private final class Transport: @unchecked Sendable {
    private let descriptor: Int32

    init(_ descriptor: Int32) {
        self.descriptor = descriptor
        #if canImport(Darwin)
            var on: Int32 = 1  // writing to who has left is an error, and no signal
            setsockopt(descriptor, SOL_SOCKET, SO_NOSIGPIPE, &on, socklen_t(MemoryLayout<Int32>.size))
        #endif
    }

    deinit { _ = close(descriptor) }

    /// The next bytes, nil at the end.
    func read() -> [UInt8]? {
        var data = [UInt8](repeating: 0, count: 1 << 16)
        while true {
            let count = recv(descriptor, &data, data.count, 0)
            if count > 0 { return Array(data[..<count]) }
            if count == 0 || errno != EINTR { return nil }
        }
    }

    /// Write all of it. False if that cannot be.
    func write(_ data: [UInt8]) -> Bool {
        var sent = 0
        while sent < data.count {
            #if canImport(Darwin)
                let count = data.withUnsafeBytes { send(descriptor, $0.baseAddress! + sent, data.count - sent, 0) }
            #else
                let count = data.withUnsafeBytes { send(descriptor, $0.baseAddress! + sent, data.count - sent, Int32(MSG_NOSIGNAL)) }
            #endif
            if count < 0 && errno != EINTR { return false }
            sent += max(count, 0)
        }
        return true
    }

    /// End it: whoever reads or writes goes on.
    func shut() {
        #if canImport(Darwin)
            _ = shutdown(descriptor, SHUT_RDWR)
        #else
            _ = shutdown(descriptor, Int32(SHUT_RDWR))
        #endif
    }
}

/// A socket that is connected to a path. Throws EdgeRtError `disconnected`.
public func unixSocket(_ path: String) throws -> Int32 {
    var address = sockaddr_un()
    address.sun_family = sa_family_t(AF_UNIX)
    let bytes = Array(path.utf8)
    let room = MemoryLayout.size(ofValue: address.sun_path)
    if bytes.count >= room { throw EdgeRtError("disconnected", "the path \(path) is too long for a socket") }
    withUnsafeMutableBytes(of: &address.sun_path) { $0.copyBytes(from: bytes) }
    #if canImport(Darwin)
        let descriptor = socket(AF_UNIX, SOCK_STREAM, 0)
    #else
        let descriptor = socket(AF_UNIX, Int32(SOCK_STREAM.rawValue), 0)
    #endif
    let size = socklen_t(MemoryLayout<sockaddr_un>.size)
    let failed = withUnsafePointer(to: &address) {
        $0.withMemoryRebound(to: sockaddr.self, capacity: 1) { connect(descriptor, $0, size) != 0 }
    }
    if descriptor < 0 || failed {
        let why = String(cString: strerror(errno))
        if descriptor >= 0 { _ = close(descriptor) }
        throw EdgeRtError("disconnected", "no daemon answers at \(path): \(why)")
    }
    return descriptor
}
