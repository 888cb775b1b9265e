// What docs/clients.md asks of the program that shows a client: ADDRESS SCENARIO PROMPT MAX_TOKENS

package edgert

import kotlin.system.exitProcess

fun main(words: Array<String>) {
    val (address, scenario, prompt, maxTokens) = words
    val out = java.io.PrintStream(java.io.FileOutputStream(java.io.FileDescriptor.out), false, "UTF-8")
    try {
        Client({ unixSocket(address) }).use { client ->
            val options = mapOf("max_tokens" to maxTokens.toInt(), "temperature" to 0, "ignore_eos" to true)
            val generation = client.generate(prompt, options, resumable = scenario != "answer")
            for (event in generation) {
                if (event["event"] != "delta") continue
                out.print(event["text"])
                out.flush()
                if (scenario == "cancel") generation.cancel()
                if (scenario == "leave") {
                    generation.close()
                    break
                }
                if (scenario == "slow") Thread.sleep(20)
            }
            client.status()
        }
    } catch (error: EdgeRtException) {
        System.err.println("error: ${error.code}")
        exitProcess(3)
    }
}
