// A client of edge-rt's daemon (docs/protocol.md, version 1). One file, no dependencies, for the JVM and Android.
// The parts and their names are those of clients/node/edge-rt.js.

package edgert

import java.io.ByteArrayOutputStream
import java.io.IOException
import java.io.InputStream
import java.io.OutputStream
import java.math.BigInteger
import java.nio.ByteBuffer
import java.nio.charset.CharacterCodingException
import java.util.concurrent.Executors
import java.util.concurrent.TimeUnit
import java.util.concurrent.locks.ReentrantLock
import kotlin.concurrent.thread
import kotlin.concurrent.withLock

private const val MAX_BYTES = 16 shl 20 // of a frame, without its length
private const val MAX_DEPTH = 32 // maps and lists within each other
private const val ACK_EVERY = 8L // events of a resumable stream between two acknowledgements
private const val UNREAD = 64 // events of a stream that is not resumable, before no more is read from the socket
private val PAUSES = listOf(50L, 200L, 500L, 1000L, 2000L) // milliseconds between attempts to connect again
private const val GONE = "the daemon has closed the connection"

/** A map as the protocol has it: null, Boolean, Long (BigInteger beyond it), Double, String, List and Map. Int and Float may be sent. */
typealias Message = Map<String, Any?>

/** What the daemon answered where it could not do as asked. [code] and [fields] are the protocol's; `disconnected` is this client's. */
class EdgeRtException(val code: String, message: String, val fields: Message = emptyMap()) : Exception(message)

// ---- MessagePack -----------------------------------------------------------------------------------------------------

/** MessagePack without extension types and binary values. */
object MessagePack {
    /** A value as bytes. Throws EdgeRtException `bad_value`. */
    fun encode(value: Any?): ByteArray = ByteArrayOutputStream().also { write(value, it, 1) }.toByteArray()

    /** The value that these bytes are. Throws EdgeRtException `bad_frame`. */
    fun decode(bytes: ByteArray): Any? {
        val reader = Reader(ByteBuffer.wrap(bytes))
        val value = reader.value(1)
        if (reader.data.hasRemaining()) throw EdgeRtException("bad_frame", "there are bytes after the value")
        return value
    }

    private fun ByteArrayOutputStream.number(code: Int, size: Int, number: Long) {
        write(code)
        for (shift in size - 1 downTo 0) write((number shr (8 * shift)).toInt())
    }

    /** A length: in the code itself if it is short ([small]: how many fit), else in 1 (if there is such a code), 2 or 4 bytes after it. */
    private fun ByteArrayOutputStream.length(count: Int, fix: Int, small: Int, code8: Int, code16: Int) = when {
        count < small -> write(fix or count)
        code8 != 0 && count < 0x100 -> number(code8, 1, count.toLong())
        count < 0x10000 -> number(code16, 2, count.toLong())
        else -> number(code16 + 1, 4, count.toLong())
    }

    private fun integer(value: Long, out: ByteArrayOutputStream) = when {
        value in -32..127 -> out.write(value.toInt())
        value < 0 -> out.number(0xd3, 8, value)
        else -> out.number(0xcf, 8, value)
    }

    private fun write(value: Any?, out: ByteArrayOutputStream, depth: Int) {
        if (depth > MAX_DEPTH + 1) throw EdgeRtException("bad_value", "more than $MAX_DEPTH maps and lists within each other")
        when (value) {
            null -> out.write(0xc0)
            is Boolean -> out.write(if (value) 0xc3 else 0xc2)
            is Int -> integer(value.toLong(), out)
            is Long -> integer(value, out)
            is BigInteger -> {
                if (value.signum() < 0 || value.bitLength() > 64) throw EdgeRtException("bad_value", "$value has more than 64 bits")
                out.number(0xcf, 8, value.toLong())
            }
            is Double -> out.number(0xcb, 8, value.toRawBits())
            is Float -> out.number(0xcb, 8, value.toDouble().toRawBits())
            is String -> {
                val data = value.toByteArray()
                out.length(data.size, 0xa0, 32, 0xd9, 0xda)
                out.write(data, 0, data.size)
            }
            is List<*> -> {
                out.length(value.size, 0x90, 16, 0, 0xdc)
                for (one in value) write(one, out, depth + 1)
            }
            is Map<*, *> -> {
                out.length(value.size, 0x80, 16, 0, 0xde)
                for ((key, one) in value) {
                    write(key as String, out, depth)
                    write(one, out, depth + 1)
                }
            }
            else -> throw EdgeRtException("bad_value", "a ${value.javaClass.name} cannot be sent")
        }
    }

    private class Reader(val data: ByteBuffer) {
        fun unsigned(size: Int): Long {
            need(size.toLong())
            var found = 0L
            repeat(size) { found = (found shl 8) or (data.get().toLong() and 0xff) }
            return found
        }

        fun signed(size: Int): Long = (unsigned(size) shl (64 - 8 * size)) shr (64 - 8 * size)

        fun value(depth: Int): Any? {
            val code = unsigned(1).toInt()
            return when {
                code < 0x80 -> code.toLong()
                code >= 0xe0 -> code.toLong() - 0x100
                code < 0x90 -> map(code.toLong() and 0x0f, depth)
                code < 0xa0 -> list(code.toLong() and 0x0f, depth)
                code < 0xc0 -> text(code.toLong() and 0x1f)
                else -> when (code) {
                    0xc0 -> null
                    0xc2 -> false
                    0xc3 -> true
                    0xca -> Float.fromBits(unsigned(4).toInt()).toDouble()
                    0xcb -> Double.fromBits(unsigned(8))
                    0xcc, 0xcd, 0xce -> unsigned(1 shl (code - 0xcc))
                    0xcf -> unsigned(8).let { if (it >= 0) it else BigInteger.valueOf(it).add(BigInteger.ONE.shiftLeft(64)) }
                    0xd0, 0xd1, 0xd2, 0xd3 -> signed(1 shl (code - 0xd0))
                    0xd9, 0xda, 0xdb -> text(unsigned(1 shl (code - 0xd9)))
                    0xdc, 0xdd -> list(unsigned(2 shl (code - 0xdc)), depth)
                    0xde, 0xdf -> map(unsigned(2 shl (code - 0xde)), depth)
                    else -> throw EdgeRtException("bad_frame", "the protocol has no values of kind 0x${code.toString(16)}")
                }
            }
        }

        private fun text(count: Long): String {
            need(count)
            val part = data.slice()
            part.limit(count.toInt())
            data.position(data.position() + count.toInt())
            try {
                return Charsets.UTF_8.newDecoder().decode(part).toString()
            } catch (error: CharacterCodingException) {
                throw EdgeRtException("bad_frame", "a text is not UTF-8")
            }
        }

        private fun list(count: Long, depth: Int): List<Any?> {
            deep(depth)
            need(count)
            return List(count.toInt()) { value(depth + 1) }
        }

        private fun map(count: Long, depth: Int): Message {
            deep(depth)
            need(2 * count)
            val found = LinkedHashMap<String, Any?>()
            repeat(count.toInt()) {
                val key = value(depth + 1) as? String ?: throw EdgeRtException("bad_frame", "the key of a map is no text")
                found[key] = value(depth + 1)
            }
            return found
        }

        private fun need(bytes: Long) {
            if (bytes > data.remaining()) throw EdgeRtException("bad_frame", "a value ends too early")
        }

        private fun deep(depth: Int) {
            if (depth > MAX_DEPTH) throw EdgeRtException("bad_frame", "more than $MAX_DEPTH maps and lists within each other")
        }
    }
}

// ---- frames ----------------------------------------------------------------------------------------------------------

/** Bytes in as they come, whole messages out. */
class Frames {
    private var held = ByteArray(1024)
    private var count = 0

    /** The messages that are complete now. Throws EdgeRtException; after that the stream cannot be read any more. */
    fun feed(data: ByteArray, size: Int = data.size): List<Message> {
        if (count + size > held.size) held = held.copyOf(maxOf(2 * held.size, count + size))
        data.copyInto(held, count, 0, size)
        count += size
        var start = 0
        val found = ArrayList<Message>()
        while (count - start >= 4) {
            val length = ByteBuffer.wrap(held, start, 4).int
            if (length < 0 || length > MAX_BYTES) throw EdgeRtException("frame_too_long", "a frame is too long")
            if (count - start - 4 < length) break
            val message = MessagePack.decode(held.copyOfRange(start + 4, start + 4 + length))
            @Suppress("UNCHECKED_CAST") // the keys of a map are texts, or it was not decoded
            found.add(message as? Message ?: throw EdgeRtException("bad_frame", "a frame is no map"))
            start += 4 + length
        }
        held.copyInto(held, 0, start, count)
        count -= start
        return found
    }

    companion object {
        /** A message as a frame. */
        fun encode(message: Message): ByteArray {
            val body = MessagePack.encode(message)
            return ByteBuffer.allocate(4 + body.size).putInt(body.size).put(body).array()
        }
    }
}

// ---- the conversation ------------------------------------------------------------------------------------------------

/** What comes for one request. [request]: its id, another one after the stream was resumed. */
class Answers(var request: Long) {
    internal var stream: String? = null
    internal var seq = 0L // of the last event received
    internal var taken = 0L // of the last event taken
    internal var acknowledged = 0L
    internal val events = ArrayDeque<Message>()
    internal var cancelled = false
    internal var left = false // nobody takes its events any more
    internal var lost = false // its connection broke, and it was not resumed yet

    /** The answer's message, null until it has come. */
    var end: Message? = null
        internal set

    /** The answer. Throws EdgeRtException if it is one. */
    @Suppress("UNCHECKED_CAST")
    fun result(): Message {
        val error = end!!["error"] ?: return end!!["ok"] as Message
        throw errorOf(error as Message)
    }
}

private fun errorOf(error: Message) =
    EdgeRtException(error["code"] as String, error["message"] as String, error - "code" - "message")

/** The protocol without input or output: requests in, bytes out; bytes in, answers out. Not for two threads at once. */
class Conversation {
    private var frames = Frames()
    private val asked = LinkedHashMap<Long, Answers>()
    private val broken = ArrayList<Answers>()
    private var number = 0L
    private var out = ByteArrayOutputStream()
    private var farewell: Message = mapOf("code" to "disconnected", "message" to GONE)
    private var frameBytes = MAX_BYTES.toLong()
    private var ackEvery = ACK_EVERY

    /** Whether there are streams to go on with in another connection. */
    val isBroken get() = broken.isNotEmpty()

    /** A request; what is null in it is left out. Throws EdgeRtException `frame_too_long`. */
    fun ask(op: String, fields: Message): Answers {
        val data = Frames.encode(mapOf("id" to number + 1, "op" to op) + fields.filterValues { it != null })
        if (data.size - 4 > frameBytes) {
            throw EdgeRtException("frame_too_long", "a request of ${data.size - 4} bytes is too long; $frameBytes are allowed")
        }
        val answers = Answers(++number)
        asked[answers.request] = answers
        out.write(data, 0, data.size)
        return answers
    }

    /** The first request of a connection. */
    fun greet(client: String, key: String?): Answers {
        out = ByteArrayOutputStream() // what was to be sent before was the other connection's, and so was what has come
        frames = Frames()
        frameBytes = MAX_BYTES.toLong()
        return ask("hello", mapOf("versions" to listOf(1), "client" to client, "key" to key))
    }

    /** What hello was answered. */
    fun greeted(hello: Message) {
        val limits = hello["limits"] as Map<*, *>
        frameBytes = limits["frame_bytes"] as Long
        ackEvery = (limits["credits"] as Long / 2).coerceIn(1, ACK_EVERY)
    }

    /** After hello in another connection: go on with the streams that broke. */
    fun resume() {
        for (answers in broken) {
            answers.request = ask("resume", mapOf("stream" to answers.stream, "after" to answers.seq)).request
            asked[answers.request] = answers
            answers.lost = false
            answers.acknowledged = answers.seq // by `after`
            if (answers.cancelled) ask("cancel", mapOf("request" to answers.request))
        }
        broken.clear()
    }

    /** The generation is to end soon. */
    fun cancel(answers: Answers) {
        if (answers.cancelled || answers.end != null) return
        answers.cancelled = true
        if (answers.request in asked) ask("cancel", mapOf("request" to answers.request)) // else when it is resumed
    }

    /** Nobody takes its events any more. */
    fun leave(answers: Answers) {
        answers.left = true
        takeAll(answers)
        cancel(answers)
    }

    /** The next event, null if there is none now. What is taken is acknowledged, so that the daemon waits for who is slow. */
    fun take(answers: Answers): Message? {
        val message = answers.events.removeFirstOrNull()
        if (message != null) answers.taken = message["seq"] as? Long ?: 0
        acknowledge(answers)
        return message
    }

    private fun takeAll(answers: Answers) {
        do { val message = take(answers) } while (message != null)
    }

    private fun acknowledge(answers: Answers) {
        val stream = answers.stream ?: return
        if (answers.lost) return
        val over = answers.end != null && answers.events.isEmpty()
        if (over) answers.taken = answers.seq
        if (answers.taken - answers.acknowledged < (if (over) 1 else ackEvery)) return
        answers.acknowledged = answers.taken
        val data = Frames.encode(mapOf("op" to "ack", "stream" to stream, "seq" to answers.taken))
        out.write(data, 0, data.size)
    }

    /** Bytes came. Throws EdgeRtException if they are none of the daemon's. */
    fun received(data: ByteArray, size: Int = data.size) {
        for (message in frames.feed(data, size)) took(message)
    }

    @Suppress("UNCHECKED_CAST")
    private fun took(message: Message) {
        val answers = asked[message["id"]]
        if (answers == null) {
            if (message["id"] == null) (message["error"] as? Message)?.let { farewell = it }
            return
        }
        answers.seq = message["seq"] as? Long ?: answers.seq
        when (message["event"]) {
            null -> {
                answers.end = message
                asked.remove(answers.request)
            }
            "stream" -> answers.stream = message["stream"] as String
            else -> answers.events.addLast(message)
        }
        if (answers.left) takeAll(answers) else if (answers.end != null) acknowledge(answers)
    }

    /** Whether somebody does not take what comes, and the daemon would not wait by itself. */
    val full get() = asked.values.any { it.stream == null && it.events.size >= UNREAD }

    /** What was asked is not answered any more, but for streams that can be resumed. */
    fun disconnected() {
        for (answers in asked.values) {
            answers.lost = answers.stream != null && answers.end == null
            if (answers.lost) broken.add(answers) else answers.end = mapOf("error" to farewell)
        }
        asked.clear()
        out = ByteArrayOutputStream()
        frames = Frames()
        farewell = mapOf("code" to "disconnected", "message" to GONE)
    }

    /** There is no other connection for the streams that broke. */
    fun giveUp(error: EdgeRtException) {
        for (answers in broken) answers.end = mapOf("error" to mapOf("code" to error.code, "message" to error.message))
        broken.clear()
    }

    /** Bytes to write now. */
    fun toSend(): ByteArray = out.toByteArray().also { out = ByteArrayOutputStream() }
}

// ---- the client ------------------------------------------------------------------------------------------------------

/** A connected socket, of whatever kind. [close] must end a [InputStream.read] that is under way. */
class Transport(val input: InputStream, val output: OutputStream, val close: () -> Unit)

/**
 * A connection to the daemon, for any number of requests at once, from any thread. Streams that are `resumable` go on when it breaks; what
 * is asked after that connects again. Everything throws EdgeRtException, and waits, so it is not for a thread that draws.
 *
 * [dial] makes a new connection each time, or throws IOException. [key]: for TCP.
 */
class Client(private val dial: () -> Transport, private val key: String? = null) : AutoCloseable {
    private val lock = ReentrantLock()
    private val changed = lock.newCondition()
    private val conversation = Conversation()
    private val writer = Executors.newSingleThreadExecutor { thread(start = false, isDaemon = true, name = "edge-rt writer") { it.run() } }
    private var transport: Transport? = null
    private var ready = false // hello was answered in it
    private var opening = false
    private var closed = false

    /** What the daemon said of itself: version, server, capabilities, limits. */
    @Volatile
    var hello: Message = emptyMap()
        private set

    init {
        try {
            open()
        } catch (error: EdgeRtException) {
            close()
            throw error
        }
    }

    /** Ask, and wait for the answer. */
    fun call(op: String, fields: Message = emptyMap()): Message {
        val answers = ask(op, fields)
        return lock.withLock {
            while (answers.end == null) changed.await()
            answers.result()
        }
    }

    /** Answer a prompt. [resumable]: it goes on when the connection breaks. [options]: those of the document. */
    fun generate(
        prompt: String, options: Message = emptyMap(), session: String? = null, priority: String? = null, resumable: Boolean = false
    ) = generate(mapOf("prompt" to prompt), options, session, priority, resumable)

    /** Answer a conversation: maps with `role` and `content`. */
    fun generate(
        messages: List<Message>, options: Message = emptyMap(), session: String? = null, priority: String? = null, resumable: Boolean = false
    ) = generate(mapOf("messages" to messages), options, session, priority, resumable)

    private fun generate(said: Message, options: Message, session: String?, priority: String?, resumable: Boolean): Generation {
        val fields = said + mapOf("session" to session, "priority" to priority, "resumable" to resumable, "options" to options)
        return Generation(this, ask("generate", fields))
    }

    /** Embeddings of texts, in their order. [options]: `pooling`, `normalize`, `dimensions`. Throws EdgeRtException. */
    fun embed(texts: List<String>, options: Message = emptyMap()): List<List<Double>> =
        Generation(this, ask("embed", options + mapOf("texts" to texts))).asSequence()
            .filter { it["event"] == "embedding" }
            .map { event -> (event["embedding"] as List<*>).map { it as Double } }
            .toList()

    /** Open a session. [keep]: it outlives this connection for a while. */
    fun openSession(keep: Boolean = false, context: Int? = null) =
        Session(this, call("open_session", mapOf("keep" to keep, "context" to context))["session"] as String)

    /** Open a session that was saved under a name. */
    fun restoreSession(name: String, keep: Boolean = false) =
        Session(this, call("restore_session", mapOf("name" to name, "keep" to keep))["session"] as String)

    /** The user's saved sessions: `name`, `bytes`, and when each was `saved`, in seconds since 1970. */
    fun savedSessions(): List<Message> =
        (call("list_saved")["saved"] as List<*>).map { one -> (one as Map<*, *>).entries.associate { it.key as String to it.value } }

    /** Delete what was saved under a name. */
    fun deleteSaved(name: String) {
        call("delete_saved", mapOf("name" to name))
    }

    /** What the daemon is at. */
    fun status() = call("status")

    /** Leave; what runs for this connection ends. */
    override fun close() {
        val (to, data) = lock.withLock {
            if (closed) return
            closed = true
            (transport to conversation.toSend()).also { gone(transport) }
        }
        writer.execute { write(to, data) }
        writer.shutdown()
        writer.awaitTermination(1, TimeUnit.SECONDS) // who reads nothing does not keep us
        to?.close?.invoke()
    }

    internal fun ask(op: String, fields: Message): Answers {
        while (true) {
            lock.withLock {
                if (closed) throw EdgeRtException("disconnected", "the client was closed")
                if (ready) return conversation.ask(op, fields).also { flush() }
            }
            openAgain()
        }
    }

    /** The next event, null after the last. Throws EdgeRtException. */
    internal fun next(answers: Answers): Message? = lock.withLock {
        while (true) {
            val message = conversation.take(answers)
            flush()
            if (message != null) return message
            if (answers.end != null) {
                answers.result()
                return null
            }
            changed.await()
        }
        @Suppress("UNREACHABLE_CODE") null
    }

    internal fun cancel(answers: Answers, leave: Boolean) = lock.withLock {
        if (leave) conversation.leave(answers) else conversation.cancel(answers)
        flush()
    }

    /** Let what is to be sent be written, by a thread that nobody waits for; and somebody may go on. To be called with the lock. */
    private fun flush() {
        changed.signalAll()
        if (!closed) writer.execute {
            val (to, data) = lock.withLock { transport to conversation.toSend() }
            write(to, data)
        }
    }

    private fun write(to: Transport?, data: ByteArray) {
        if (to == null || data.isEmpty()) return
        try {
            to.output.write(data)
            to.output.flush()
        } catch (error: IOException) {
            to.close() // the reader takes it from there
        }
    }

    /** A connection in which hello was said. */
    private fun open() {
        val to = try {
            dial()
        } catch (error: IOException) {
            throw EdgeRtException("disconnected", "no daemon answers: ${error.message}")
        }
        try {
            lock.withLock {
                if (closed) throw EdgeRtException("disconnected", "the client was closed")
                transport = to
                val answers = conversation.greet("edge-rt-kotlin/1", key)
                flush()
                thread(isDaemon = true, name = "edge-rt reader") { read(to) }
                while (answers.end == null) changed.await()
                hello = answers.result()
                if (transport !== to) throw EdgeRtException("disconnected", GONE)
                conversation.greeted(hello)
                ready = true
                conversation.resume()
                flush()
            }
        } catch (error: EdgeRtException) {
            to.close()
            throw error
        }
    }

    /** Take what comes; at its end, go on in another connection, as long as there are streams to go on with. */
    private fun read(from: Transport) {
        val data = ByteArray(1 shl 16)
        try {
            while (true) {
                val size = from.input.read(data)
                if (size < 0) break
                lock.withLock {
                    if (transport !== from) return
                    conversation.received(data, size)
                    flush()
                    while (conversation.full && transport === from) changed.await()
                }
            }
        } catch (error: IOException) {
            // It broke, which is the same as its end.
        } catch (error: EdgeRtException) {
            // What cannot be read is, too.
        }
        from.close()
        val again = lock.withLock { gone(from) && broke() && !opening }
        if (again) {
            try {
                openAgain()
            } catch (error: EdgeRtException) {
                // The streams were told by giveUp.
            }
        }
    }

    /** This connection is no more. False if that is known. To be called with the lock. */
    private fun gone(which: Transport?): Boolean {
        if (transport !== which) return false
        transport = null
        ready = false
        conversation.disconnected()
        if (closed) conversation.giveUp(EdgeRtException("disconnected", "the client was closed"))
        changed.signalAll()
        return true
    }

    /** Connect again, or wait for who does. */
    private fun openAgain() {
        lock.withLock {
            if (ready) return
            if (opening) {
                while (opening) changed.await()
                if (!ready) throw EdgeRtException("disconnected", GONE)
                return
            }
            opening = true
        }
        try {
            do {
                attempts()
            } while (lock.withLock { broke().also { opening = it } }) // a connection that broke meanwhile was left to us
        } finally {
            lock.withLock {
                opening = false
                changed.signalAll()
            }
        }
    }

    /** Whether streams wait for another connection. To be called with the lock. */
    private fun broke() = !ready && !closed && conversation.isBroken

    private fun attempts() {
        for (pause in PAUSES + 0L) {
            try {
                return open()
            } catch (error: EdgeRtException) {
                if (pause == 0L || error.code != "disconnected" || lock.withLock { closed }) {
                    lock.withLock {
                        conversation.giveUp(error)
                        changed.signalAll()
                    }
                    throw error
                }
                Thread.sleep(pause)
            }
        }
    }
}

/** The events of one answer, to be taken by one thread; the last is `done`. Closing it before that cancels it. */
class Generation internal constructor(private val client: Client, private val answers: Answers) : Iterator<Message>, AutoCloseable {
    private var ahead: Message? = null

    /** Waits for the next event. Throws EdgeRtException. */
    override fun hasNext(): Boolean {
        if (ahead == null) ahead = client.next(answers)
        return ahead != null
    }

    override fun next(): Message {
        if (!hasNext()) throw NoSuchElementException()
        return ahead!!.also { ahead = null }
    }

    /** It is to end soon; its events go on until `done`, whose reason is then `cancelled`. From any thread. */
    fun cancel() = client.cancel(answers, leave = false)

    /** Nobody takes its events any more. */
    override fun close() = client.cancel(answers, leave = true)

    /** All of its text. */
    fun text(): String = asSequence().filter { it["event"] == "delta" }.joinToString("") { it["text"] as String }

    /** Take the events in a thread of their own: [onEvent] for each, then [onEnd] with null, or with the error. */
    fun listen(onEvent: (Message) -> Unit, onEnd: (EdgeRtException?) -> Unit): Generation {
        thread(isDaemon = true, name = "edge-rt listener") {
            val error = try {
                while (hasNext()) onEvent(next())
                null
            } catch (error: EdgeRtException) {
                error
            }
            onEnd(error)
        }
        return this
    }
}

/** A session in the daemon. */
class Session internal constructor(private val client: Client, val id: String) : AutoCloseable {
    /** See [Client.generate]. */
    fun generate(prompt: String, options: Message = emptyMap(), priority: String? = null, resumable: Boolean = false) =
        client.generate(prompt, options, id, priority, resumable)

    /** See [Client.generate]. */
    fun generate(messages: List<Message>, options: Message = emptyMap(), priority: String? = null, resumable: Boolean = false) =
        client.generate(messages, options, id, priority, resumable)

    /** Another session that goes on from what was said in this one. */
    fun clone(keep: Boolean = false) =
        Session(client, client.call("clone_session", mapOf("session" to id, "keep" to keep))["session"] as String)

    /** Keep it under a name, in the daemon's folder. */
    fun save(name: String) {
        client.call("save_session", mapOf("session" to id, "name" to name))
    }

    override fun close() {
        client.call("close_session", mapOf("session" to id))
    }
}
