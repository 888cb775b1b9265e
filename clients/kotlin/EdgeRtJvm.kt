// Sockets of the JVM 16 or later for EdgeRt.kt. Android has LocalSocket instead: see README.md.

package edgert

import java.io.IOException
import java.io.InputStream
import java.io.OutputStream
import java.net.StandardProtocolFamily
import java.net.UnixDomainSocketAddress
import java.nio.ByteBuffer
import java.nio.channels.SocketChannel

/** A connection to a Unix domain socket. Throws IOException. */
fun unixSocket(path: String): Transport {
    val channel = SocketChannel.open(StandardProtocolFamily.UNIX)
    try {
        channel.connect(UnixDomainSocketAddress.of(path))
    } catch (error: IOException) {
        channel.close()
        throw error
    }
    // Channels.newInputStream and newOutputStream of one channel wait for each other before Java 19 (JDK-8279339).
    val input = object : InputStream() {
        override fun read(): Int = ByteArray(1).let { if (read(it, 0, 1) < 0) -1 else it[0].toInt() and 0xff }
        override fun read(data: ByteArray, offset: Int, length: Int): Int = channel.read(ByteBuffer.wrap(data, offset, length))
    }
    val output = object : OutputStream() {
        override fun write(byte: Int) = write(byteArrayOf(byte.toByte()), 0, 1)
        override fun write(data: ByteArray, offset: Int, length: Int) {
            val left = ByteBuffer.wrap(data, offset, length)
            while (left.hasRemaining()) channel.write(left)
        }
    }
    return Transport(input, output) { channel.close() }
}
