// What docs/clients.md asks of the program that shows a client: ADDRESS SCENARIO PROMPT MAX_TOKENS

import Foundation

let words = CommandLine.arguments
let (address, scenario, prompt, maxTokens) = (words[1], words[2], words[3], Int64(words[4])!)

do {
    let client = try Client(path: address)
    defer { client.close() }
    let options: Message = ["max_tokens": .integer(maxTokens), "temperature": 0, "ignore_eos": true]
    let generation = try client.generate(prompt, options: options, resumable: scenario != "answer")
    for try await event in generation.events {
        guard event["event"] == "delta", let text = event["text"]?.text else { continue }
        FileHandle.standardOutput.write(Data(text.utf8))
        if scenario == "cancel" { generation.cancel() }
        if scenario == "leave" {
            generation.close()
            break
        }
        if scenario == "slow" { try await Task.sleep(nanoseconds: 20_000_000) }
    }
    _ = try client.status()
} catch let error as EdgeRtError {
    FileHandle.standardError.write(Data("error: \(error.code)\n".utf8))
    exit(3)
}
